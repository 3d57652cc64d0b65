"""UUIDv7: sorted by time, carrying its date, derived where the same has to come out again."""

import threading
import time
import uuid

import pytest
from hypothesis import given
from hypothesis import strategies as st

from millstream.schemas.attempt_keys import (
    KEY_GRACE_S,
    BadKey,
    Claims,
    attempt_key,
    attempt_path,
    check_issued,
    claims_of,
)
from millstream.schemas.ids import derived_id, derived_seed, id_time_ms, matching_ids, new_id


def test_a_new_id_is_a_uuid7_of_now() -> None:
    before = time.time_ns() // 1_000_000
    found = new_id()
    parsed = uuid.UUID(found)
    assert str(parsed) == found
    assert (parsed.version, parsed.variant) == (7, uuid.RFC_4122)
    assert before <= id_time_ms(found) <= time.time_ns() // 1_000_000


def test_ids_do_not_repeat_across_threads() -> None:
    found: list[str] = []
    threads = [threading.Thread(target=lambda: found.extend([new_id() for _ in range(2000)])) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(found)) == 8000


TIMES = st.integers(0, (2**48 - 1) * 1_000_000)


@given(TIMES, TIMES, st.text(), st.text())
def test_ids_sort_by_their_time(one: int, other: int, a: str, b: str) -> None:
    first, second = derived_id(one, a), derived_id(other, b)
    if one // 1_000_000 < other // 1_000_000:
        assert first < second
    assert id_time_ms(first) == one // 1_000_000


@given(TIMES, st.lists(st.one_of(st.integers(), st.from_regex(r"[a-z0-9]+", fullmatch=True)), max_size=4))
def test_a_derived_id_is_the_same_each_time_and_depends_on_every_part(at: int, parts: list[object]) -> None:
    found = derived_id(at, *parts)
    assert derived_id(at, *parts) == found
    assert uuid.UUID(found).version == 7
    for n in range(len(parts)):
        assert derived_id(at, *parts[:n], "other", *parts[n + 1 :]) != found or str(parts[n]) == "other"


def test_parts_do_not_run_into_each_other() -> None:
    assert derived_id(1, "ab", "c") != derived_id(1, "a", "bc")


@pytest.mark.parametrize("value", [str(uuid.UUID(int=4)), "c232ab00-9414-11ec-b3c8-9f6bdeced846"])
def test_only_a_uuid7_has_a_time(value: str) -> None:
    with pytest.raises(ValueError, match="is not a UUIDv7"):
        id_time_ms(value)


def test_the_example_of_the_rfc() -> None:
    """RFC 9562, appendix A.6."""
    assert id_time_ms("017F22E2-79B0-7CC3-98C4-DC0C0C07398F") == 0x017F22E279B0


def test_an_attempts_key_fits_its_own_path_only() -> None:
    key = attempt_key("secret", "r", "a", valid_s=60.0, resources_id="v1", seed=-7, now=1000.0)
    assert attempt_path("r", "a") == "/rollout/r/attempt/a"
    assert claims_of("secret", "r", "a", key, now=1001.0) == Claims(1000.0, 1060.0 + KEY_GRACE_S, "v1", -7)
    for other in (("other", "r", "a"), ("secret", "r", "b"), ("secret", "s", "a")):
        with pytest.raises(BadKey, match=f"does not belong to attempt {other[2]}"):
            claims_of(*other, key, now=1001.0)
    with pytest.raises(BadKey, match="expired"):
        claims_of("secret", "r", "a", key, now=1061.0 + KEY_GRACE_S)


@pytest.mark.parametrize("key", ["", "x", "ms2.1000.9999.", "ms2.1000.9999..v1." + "0" * 64, "é" * 9, "....", "a.b"])
def test_what_is_no_key_is_refused(key: str) -> None:
    with pytest.raises(BadKey):
        claims_of("secret", "r", "a", key)


def test_a_key_cant_be_given_more_time() -> None:
    key = attempt_key("secret", "r", "a", valid_s=60.0, now=1000.0)
    mark, issued, expires, seed, resources, mac = key.split(".")
    longer = ".".join([mark, issued, str(int(expires) + 1), seed, resources, mac])
    seeded = ".".join([mark, issued, expires, "1", resources, mac])
    for forged in (longer, seeded):
        with pytest.raises(BadKey, match="does not belong to attempt"):
            claims_of("secret", "r", "a", forged, now=1001.0)


@pytest.mark.parametrize("seed", [None, 0, -(2**63), 2**63 - 1])
@pytest.mark.parametrize("resources_id", ["", "v1.2", "7"])
def test_a_key_holds_its_tasks_seed(seed: int | None, resources_id: str) -> None:
    key = attempt_key("secret", "r", "a", valid_s=60.0, resources_id=resources_id, seed=seed)
    claims = claims_of("secret", "r", "a", key)
    assert (claims.seed, claims.resources_id) == (seed, resources_id)
    check_issued("secret", key)


def test_a_key_of_another_version_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("millstream.schemas.attempt_keys._MARK", "ms1")
    key = attempt_key("secret", "r", "a", valid_s=60.0)
    monkeypatch.undo()
    with pytest.raises(BadKey, match="another version of Millstream: let runners and proxies have the same one"):
        claims_of("secret", "r", "a", key)


def test_seeds_derived_from_one_are_different_and_always_the_same() -> None:
    derived = {derived_seed(seed, number) for seed in (-1, 0, 1, 11) for number in range(100)}
    assert len(derived) == 400
    assert min(derived) >= 0
    assert max(derived) < 2**63
    assert derived_seed(1, 1) == 7924470993835915212


ID = "01890a5d-ac96-774b-bcce-b302099a8057"


@pytest.mark.parametrize(
    ("wanted", "found"),
    [
        (ID, [ID]),
        (ID[-12:], [ID]),
        (ID[:20], [ID]),
        (ID[-5:], [ID]),
        ("ac96", []),
        ("", [ID, "x"]),
        ("x", ["x"]),
    ],
)
def test_ids_are_found_by_their_beginning_or_end(wanted: str, found: list[str]) -> None:
    assert matching_ids(wanted, [ID, "x", ID]) == found
