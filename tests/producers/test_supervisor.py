"""The supervisor of background tasks and threads."""

import asyncio
import threading

import pytest

from millstream.producers.supervisor import Supervisor, supervised, supervisor
from millstream.schemas.errors import BackgroundFailed


async def forever() -> None:
    await asyncio.Event().wait()


async def returning() -> None:
    pass


async def broken() -> None:
    raise ValueError("a bug")


@pytest.mark.parametrize(
    ("kind", "work", "failure"),
    [
        ("loop", returning, "task t returned"),
        ("loop", broken, "task t was ended by ValueError: a bug"),
        ("job", broken, "task t was ended by ValueError: a bug"),
        ("job", returning, None),
    ],
)
async def test_an_unexpected_end_is_reported_once_with_its_stack(
    kind: str, work: object, failure: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    reported: list[BackgroundFailed] = []
    watching = Supervisor(reported.append)
    background = getattr(watching, kind)("t", work())  # type: ignore[operator]
    await asyncio.wait([background.task])
    await asyncio.sleep(0)
    assert [str(each).partition(";")[0] for each in reported] == ([failure] if failure else [])
    assert ("in broken" in caplog.text) == (work is broken)
    assert watching.tasks == ()
    watching.failed("another")
    assert len(reported) == 1


async def test_whoever_started_a_task_may_end_it_and_nobody_else() -> None:
    watching = Supervisor()
    for start in (watching.loop, watching.job):
        await start("mine", forever()).close()
        assert watching.failure is None
    stranger = watching.job("theirs", forever())
    stranger.task.cancel()
    await asyncio.wait([stranger.task])
    await asyncio.sleep(0)
    assert "task theirs was ended by CancelledError" in str(watching.failure)


@pytest.mark.parametrize("error", [ValueError, SystemExit])
def test_a_thread_may_return_but_not_raise(error: type[BaseException]) -> None:
    def raising() -> None:
        raise error

    watching = Supervisor()
    watching.thread("quiet", lambda: None).join()
    assert watching.failure is None
    watching.thread("loud", raising).join()
    assert f"thread loud was ended by {error.__name__}" in str(watching.failure)
    assert watching.threads == ()


async def test_all_that_a_role_starts_has_its_supervisor() -> None:
    with supervised() as mine:
        assert supervisor() is mine
        assert await asyncio.to_thread(supervisor) is mine
        assert await asyncio.create_task(asyncio.to_thread(supervisor)) is mine
        with supervised() as inner:
            assert supervisor() is inner
        late = mine.loop("late", forever())
    assert supervisor() is not mine
    late.task.cancel()
    await asyncio.wait([late.task])
    await asyncio.sleep(0)
    assert mine.failure is None  # the role has ended


async def test_a_task_ages_from_its_last_success() -> None:
    watching = Supervisor()
    silent, reporting = watching.loop("silent", forever()), watching.loop("reporting", forever())
    assert watching.age_s == 0.0
    reporting.succeeded()
    await asyncio.get_running_loop().run_in_executor(None, threading.Event().wait, 0.01)
    assert 0.01 <= watching.age_s == pytest.approx(reporting.age_s, abs=1.0)
    await silent.close()
    await reporting.close()
    assert watching.age_s == 0.0
