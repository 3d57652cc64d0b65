"""What a process of an attempt is told. That it is enough, tests/pipeline/services/test_otlp_receiver.py shows."""

import pytest
from factories import task

import millstream as ms
from millstream.producers.agent.attempt import AttemptContext, enter, leave
from millstream.producers.agent.client_binding import OutsideRollout


def test_each_part_is_there_if_the_deployment_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_RESOURCE_ATTRIBUTES", "team=blue")
    for proxy, gateway in (("http://proxy/base/", "http://gateway:8600/"), ("", "")):
        attempt = AttemptContext(
            task(rollout_id="r"), "a", [].append, [].append, proxy_url=proxy, proxy_key="k", gateway_url=gateway
        )
        token = enter(attempt)
        found = ms.attempt_environment()
        leave(token)
        assert found == (
            {
                "OPENAI_BASE_URL": "http://proxy/base/rollout/r/attempt/a/v1",
                "OPENAI_API_KEY": "k",
                "ANTHROPIC_BASE_URL": "http://proxy/base/rollout/r/attempt/a",
                "ANTHROPIC_API_KEY": "k",
                "OTEL_RESOURCE_ATTRIBUTES": "team=blue,millstream.rollout_id=r,millstream.attempt_id=a",
                "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://gateway:8600/v1/traces",
                "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL": "http/protobuf",
                "OTEL_EXPORTER_OTLP_TRACES_HEADERS": "authorization=Bearer%20k",
            }
            if proxy
            else {}
        )


@pytest.mark.parametrize(
    ("seed", "found"), [(None, {}), (0, {"MILLSTREAM_SEED": "0"}), (-7, {"MILLSTREAM_SEED": "-7"})]
)
def test_the_seed_of_the_task_is_there(seed: int | None, found: dict[str, str]) -> None:
    attempt = AttemptContext(task(seed=seed), "a", [].append, [].append)
    token = enter(attempt)
    assert ms.attempt_environment() == found
    leave(token)
    assert attempt.rollout.seed == seed


def test_outside_a_rollout_there_is_nothing_to_tell() -> None:
    with pytest.raises(OutsideRollout, match="attempt_environment"):
        ms.attempt_environment()
