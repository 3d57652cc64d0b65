"""What ``millstream sink --sink`` finds."""

import pytest

from millstream.consumers.sink.choose import open_sink, sink_name
from millstream.schemas.config.settings import load_settings
from millstream.schemas.errors import ConfigError


@pytest.fixture
def _module(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "our_sinks.py").write_text(
        "class Half:\n"
        "    def __init__(self, settings): self.settings = settings\n"
        "    def write(self, batch): return []\n"
        "class Whole(Half):\n"
        "    def flush(self): pass\n"
        "    def close(self): pass\n"
        "ready = Whole(None)\n"
    )


@pytest.mark.usefixtures("_module")
def test_a_sink_of_ones_own_is_made_of_the_settings():
    settings = load_settings()
    assert open_sink("our_sinks:Whole", settings).settings is settings
    assert open_sink("our_sinks:ready", settings).settings is None
    with pytest.raises(ConfigError, match="sink 'our_sinks:Half' is a Half, which lacks write, flush or close"):
        open_sink("our_sinks:Half", settings)
    with pytest.raises(ConfigError, match="our_sinks has no None"):
        open_sink("our_sinks:None", settings)


def test_each_kind_has_a_group_of_its_own():
    assert [sink_name(s) for s in ("clickhouse", "a.b:MySink")] == ["", "MySink"]
