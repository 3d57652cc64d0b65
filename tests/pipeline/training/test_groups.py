"""Which versions of the policy may have made what is trained on."""

import pytest
from factories import finished

from millstream.pipeline.training.groups import Group, Lineage, checked


def lineage() -> Lineage:
    """Epoch 0 was abandoned after step 4, epoch 1 after step 6; now at step 7 of epoch 2."""
    found = Lineage("r", 0, 8)
    found.restart(4)
    found.step = 9
    found.restart(6)
    found.step = 7
    return found


def test_an_abandoned_epoch_bounds_those_before_it() -> None:
    found = lineage()
    assert found.version == "r.2.7"
    assert found.ends == {0: 4, 1: 6}
    found.restart(3)
    assert found.ends == {0: 3, 1: 3, 2: 3}
    assert Lineage.from_json(found.to_json()) == found


@pytest.mark.parametrize(("version", "step"), [("r.0.4", 4), ("r.1.6", 6), ("r.2.7", 7), ("r.2.0", 0)])
def test_a_version_that_counts(version: str, step: int) -> None:
    assert lineage().step_of(version) == step


@pytest.mark.parametrize(
    ("version", "why"),
    [
        ("r.0.5", "abandoned"),
        ("r.1.7", "abandoned"),
        ("r.2.8", "newer than the trainer's r.2.7"),
        ("r.3.0", "newer"),
        ("mixed", "none of run r"),
        ("other.0.1", "none of run r"),
        ("base.0.0", "none of run r"),
        ("r.x.1", "none of run r"),
        ("", "none of run r"),
    ],
)
def test_a_version_that_does_not_count(version: str, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        lineage().step_of(version)


def test_turns_of_wrong_versions_are_not_trained_on_and_say_why() -> None:
    turns = [{"model_version": version} for version in ["r.2.5", "mixed", None, "r.0.3", "r.2.9"]]
    group, oldest = checked(Group("g", (finished("r", turns),)), lineage())
    (member,) = group.members
    assert [t.trainable for t in member.triplets] == [True, False, True, True, False]
    assert member.triplets[4].reason == "turn 4: it was made by version r.2.9, newer than the trainer's r.2.7"
    assert oldest == 3
