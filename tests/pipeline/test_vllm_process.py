"""Starting vLLM where there is none."""

import sys
from pathlib import Path

import pytest

from millstream.pipeline.vllm_process import VllmOptions, VllmProcess
from millstream.schemas.errors import ConfigError, MillstreamError
from millstream.schemas.settings import load_settings


def process(tmp_path, python):
    return VllmProcess(tmp_path, VllmOptions(), load_settings(vllm_python=python), tmp_path, "vllm")


async def test_a_missing_environment_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"no vLLM at .*nowhere \(setting vllm_python\); `make vllm` sets it up"):
        await process(tmp_path, Path("/nowhere")).start()


async def test_what_ends_at_once_says_why(tmp_path):
    vllm = process(tmp_path, Path(sys.executable))
    with pytest.raises(MillstreamError, match="No module named 'vllm'"):
        await vllm.start()
    assert vllm.pid is None
