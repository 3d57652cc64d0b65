"""An installation without chDB: what opens an embedded store says so, everything else works."""

import subprocess
import sys

import pytest

WITHOUT_CHDB = """
import sys
class Missing:
    def find_spec(name, path=None, target=None):
        if name.partition(".")[0] in ("chdb", "pandas"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Missing)
"""
COMMAND = "from millstream.pipeline.cli.main import main; main()"


def run(code, *arguments, cwd, environment=()):
    return subprocess.run(
        [sys.executable, "-c", WITHOUT_CHDB + code, *arguments],
        cwd=cwd,
        env={"PYTHONPATH": ":".join(sys.path), "PATH": "/usr/bin:/bin", **dict(environment)},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize(
    "code",
    [
        "from millstream.consumers.sink.clickhouse_connection import connect; connect(load_settings())",
        "from millstream.consumers.sink.clickhouse_writer import ClickHouseWriter; ClickHouseWriter(load_settings())",
        "import millstream as ms; ms.ClickHouseStore(load_settings(clickhouse_dsn='chdb://:memory:'))",
    ],
    ids=["connection", "writer", "store in memory"],
)
def test_without_chdb_an_embedded_store_names_the_extra(tmp_path, code):
    code = "from millstream.schemas.config.settings import load_settings\n" + code
    result = run(code, cwd=tmp_path)
    assert "ConfigError: setting clickhouse_dsn: an embedded store (chdb://…) needs chDB: " in result.stderr
    assert "install millstream[embedded], or name a server (clickhouse://user@host:8123)" in result.stderr


def test_without_chdb_a_command_that_opens_an_embedded_store_ends_as_for_a_wrong_setting(tmp_path):
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "data").mkdir()
    dsn = f"chdb://{tmp_path / 'store'}"
    result = run(COMMAND, "sql", "SELECT 1", cwd=tmp_path, environment={"MILLSTREAM_CLICKHOUSE_DSN": dsn})
    assert result.returncode == 2
    assert "install millstream[embedded]" in result.stderr
    assert "Traceback" not in result.stderr


def test_without_chdb_the_roles_beside_a_server_are_imported(tmp_path):
    modules = (
        "millstream.pipeline.cli.roles",
        "millstream.pipeline.store.read_server",
        "millstream.pipeline.ui.serve",
        "millstream.consumers.sink.choose",
    )
    result = run(f"import {', '.join(modules)}; print('imported')", cwd=tmp_path)
    assert result.stdout == "imported\n", result.stderr


def test_a_dataframe_without_pandas_names_the_extra(tmp_path):
    code = (
        "import pyarrow\n"
        "from millstream.pipeline.store.results import Store\n"
        "class Own(Store):\n"
        "    def sql_arrow(self, query, parameters=None): return pyarrow.table({'a': [1]})\n"
        "Own().sql_df('SELECT 1')\n"
    )
    result = run(code, cwd=tmp_path)
    assert "StoreError: sql_df needs pandas: install it, or millstream[embedded]" in result.stderr
