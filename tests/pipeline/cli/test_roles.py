"""Commands that run roles refuse what can't work before they touch the log."""

import pytest
from typer.testing import CliRunner

from millstream.pipeline.cli.main import app
from millstream.schemas.errors import ConfigError


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["--", "sink"], "autoscale runs runners, not 'sink'"),
        (["--", "runner", "a:b", "--drain-s", "5"], "give --drain-s to autoscale, before the --"),
        (["--", "runner", "a:b", "--health-port=9100"], "give --health-port to autoscale, before the --"),
        (["--min", "3", "--max", "2", "--", "runner", "a:b"], "use --min ≤ --max ≤ kafka_partitions, 8"),
        (["--max", "9", "--", "runner", "a:b"], "a runner without a partition gets no task"),
    ],
)
def test_autoscale_refuses(words: list[str], why: str) -> None:
    result = CliRunner().invoke(app, ["autoscale", *words])
    assert isinstance(result.exception, ConfigError)
    assert why in str(result.exception)
