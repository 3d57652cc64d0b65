"""Starting vLLM where there is none, and keeping a stand-in for it running."""

import asyncio
import os
import signal
import sys
from pathlib import Path

import pytest

pytest.importorskip("safetensors")

import numpy as np
from safetensors.numpy import save_file

from millstream.pipeline.models.server import UpdateFailed
from millstream.pipeline.models.vllm_process import DEFAULT_POLICY, VllmOptions, VllmPolicy, VllmProcess
from millstream.pipeline.models.vllm_replica import Replica
from millstream.pipeline.models.vllm_server import VllmServer
from millstream.pipeline.models.weight_files import Weights
from millstream.schemas.config.settings import load_settings
from millstream.schemas.errors import ConfigError, MillstreamError


def process(tmp_path, python, policy=DEFAULT_POLICY):
    settings = load_settings(vllm_python=python)
    return VllmProcess(tmp_path, VllmOptions(), settings, tmp_path, "vllm", policy=policy)


async def test_a_missing_environment_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"no vLLM at .*nowhere \(setting vllm_python\); `make vllm` sets it up"):
        await process(tmp_path, Path("/nowhere")).start()


async def test_a_process_that_ends_at_once_reports_why(tmp_path):
    vllm = process(tmp_path, Path(sys.executable))
    with pytest.raises(MillstreamError, match="No module named 'vllm'"):
        await vllm.start()
    assert vllm.pid is None


async def test_each_replica_has_gpus_of_its_own(tmp_path):
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\necho "sees $CUDA_VISIBLE_DEVICES"\n')
    python.chmod(0o755)
    model = version(tmp_path, 0).folder
    settings = load_settings(vllm_python=python, weights_root=tmp_path)
    options = VllmOptions(replicas=2, gpus=("0,1", "2,3"))
    server = VllmServer(model, options, settings, tmp_path / "vllm", version="run.0.0")
    for replica, gpus in zip(server.replicas, options.gpus, strict=True):
        with pytest.raises(MillstreamError, match=f"sees {gpus}"):
            await replica.process.start()
    with pytest.raises(ConfigError, match="gpus names those of 2 replicas, but there are 3"):
        VllmOptions(replicas=3, gpus=("0", "1"))


@pytest.fixture
async def replica(tmp_path):
    """One of a stand-in, with short time-outs."""
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} {Path(__file__).parents[2] / "vllm" / "standin.py"} "$@"\n')
    python.chmod(0o755)
    replica = Replica(
        process(tmp_path, python, VllmPolicy(probe_s=0.2, call_s=2.0)), VllmOptions(), version(tmp_path, 0)
    )
    await replica.start()
    yield replica
    await replica.close()


def version(folder, number):
    place = folder / str(number)
    place.mkdir()
    save_file({"a": np.ones(2)}, place / "model.safetensors")
    return Weights(f"run.0.{number}", place)


async def until_restarted(replica):
    while replica.restarts == 0:  # noqa: ASYNC110 - there is no event for it
        await asyncio.sleep(0.05)


async def test_one_that_hangs_is_ended_and_comes_back_with_the_last_good_version(replica, tmp_path):
    await replica.load(version(tmp_path, 1))
    hung = replica.process.pid
    os.kill(hung, signal.SIGSTOP)
    await until_restarted(replica)
    with pytest.raises(ProcessLookupError):
        os.kill(hung, 0)
    await replica._canary("policy", "run.0.1")


async def test_one_that_hangs_in_an_update_is_ended_at_once(replica, tmp_path):
    os.kill(replica.process.pid, signal.SIGSTOP)
    with pytest.raises(UpdateFailed, match=r"run\.0\.1 did not go live.*TimeoutError.*restarted with it"):
        await replica.load(version(tmp_path, 1))
    await until_restarted(replica)
    await replica._canary("policy", "run.0.0")


async def test_weights_that_are_gone_are_never_reported_as_served(replica, tmp_path):
    gone = version(tmp_path, 1)
    (gone.folder / "model.safetensors").unlink()
    with pytest.raises(UpdateFailed, match=r"run\.0\.1 did not go live.*do not fit the model: a; run\.0\.0 is back"):
        await replica.load(gone)
    await replica._canary("policy", "run.0.0")
