from pathlib import Path

import pytest

pytest.importorskip("torch")

import torch
from safetensors.torch import load_file

from millstream.pipeline.algorithms.verl.exchange import Exchange, ExchangePolicy
from millstream.pipeline.training.groups import Lineage
from millstream.schemas.errors import MillstreamError

pytestmark = pytest.mark.torch


def test_weights_are_found_once_they_are_complete(tmp_path: Path) -> None:
    job, trainer = Exchange(tmp_path, "a"), Exchange(tmp_path, "a")
    assert trainer.newest() is None
    job.write(0, {"w": torch.ones(3)})
    job.write(10, {"w": torch.zeros(3)})
    assert trainer.newest() == 10
    assert torch.equal(load_file(trainer.weights_of(10))["w"], torch.zeros(3))
    assert [path.name for path in tmp_path.rglob("*.part")] == []


def test_only_what_is_served_is_kept(tmp_path: Path) -> None:
    exchange = Exchange(tmp_path, "a")
    for step in (1, 2):
        exchange.write(step, {"w": torch.ones(3)})
    exchange.remove_before(2)
    assert not exchange.weights_of(1).exists()
    assert exchange.newest() == 2


def test_a_start_sees_no_weights_of_the_one_before(tmp_path: Path) -> None:
    Exchange(tmp_path, "a").write(7, {"w": torch.ones(3)})
    assert Exchange(tmp_path, "b").newest() is None


def test_a_step_waits_until_its_weights_are_served(tmp_path: Path) -> None:
    exchange = Exchange(tmp_path, "b", ExchangePolicy(poll_s=0.001, serve_s=0.01))
    Exchange(tmp_path, "a").acknowledge(3, "of-a", Lineage("run", step=3))  # of the start before
    with pytest.raises(MillstreamError, match=r"the weights of step 3 \(.*\) were not served within 0.01 s"):
        exchange.wait_until_served(3)
    exchange.acknowledge(3, "of-b", Lineage("run", epoch=1, step=3), stop=True)
    served = exchange.wait_until_served(3)
    assert (served.resources_id, served.stop) == ("of-b", True)


def test_what_an_earlier_start_asked_with_is_known(tmp_path: Path) -> None:
    first, second = Exchange(tmp_path, "a"), Exchange(tmp_path, "b")
    first.acknowledge(3, "of-a", Lineage("run", step=3))
    second.acknowledge(3, "of-b", Lineage("run", epoch=1, step=3))
    found = second.served_by("a", 3)
    assert found is not None
    assert found.resources_id == "of-a"
    assert second.served_by("a", 4) is None


def test_a_line_that_is_being_written_does_not_count(tmp_path: Path) -> None:
    exchange = Exchange(tmp_path, "a")
    exchange.acknowledge(0, "r", Lineage("run"))
    with (tmp_path / "served.jsonl").open("a") as file:
        file.write('{"attempt": "a", "st')
    assert [each.step for each in exchange.served()] == [0]


def test_the_lineage_is_that_of_the_version_served_last(tmp_path: Path) -> None:
    first, second, lineage = Exchange(tmp_path, "a"), Exchange(tmp_path, "b"), Lineage("run")
    for lineage.step in range(5):
        first.acknowledge(lineage.step, "r", lineage)
    lineage.restart(3)  # version 0.4 is lost
    second.acknowledge(3, "r", lineage)
    assert second.lineage().step_of("run.0.3") == second.lineage().step_of("run.1.3") == 3
    with pytest.raises(ValueError, match="abandoned"):
        second.lineage().step_of("run.0.4")


def test_what_a_step_trains_on_is_known_to_its_start(tmp_path: Path) -> None:
    Exchange(tmp_path, "a").note_trained(3, {"a-2-1": ["r1", "r2"]})
    assert Exchange(tmp_path, "a").trained(3) == {"a-2-1": ["r1", "r2"]}
