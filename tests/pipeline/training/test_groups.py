"""Which versions of the policy may have made what is trained on."""

import json

import pytest
from factories import finished, tokens

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
    assert member.triplets[4].reason == "turn 4: made by version r.2.9, newer than the trainer's r.2.7"
    assert oldest == 3


FOUR = tokens([1], [5, 6, 7, 8], [-1.0] * 4) | {"model_version": "mixed"}


def mixed(*versions: tuple[int, str]) -> dict[str, object]:
    """A turn of four tokens."""
    return FOUR | {"response_versions": json.dumps(versions)}


@pytest.mark.parametrize(
    ("versions", "oldest"),
    [
        ([(0, "r.2.5"), (2, "r.2.7")], 5),  # up to the trainer's own version
        ([(0, "r.2.7"), (3, "r.2.5")], 5),  # the oldest token need not be the first
        ([(0, "r.0.4"), (1, "r.1.6"), (2, "r.2.6"), (3, "r.2.7")], 4),
    ],
)
def test_a_turn_of_several_versions_is_as_old_as_its_oldest_token(versions: list[tuple[int, str]], oldest: int) -> None:
    group, found = checked(Group("g", (finished("r", [mixed(*versions), {"model_version": "r.2.7"}]),)), lineage())
    assert [t.trainable for t in group.members[0].triplets] == [True, True]
    assert found == oldest


@pytest.mark.parametrize(
    ("turn", "why"),
    [
        (FOUR, "weights changed while it was sampled, and the model server did not say at which tokens"),
        (mixed((0, "r.2.5"), (2, "r.2.8")), "tokens 2 to 3: made by version r.2.8, newer than the trainer's r.2.7"),
        (mixed((0, "r.1.7"), (3, "r.2.7")), "tokens 0 to 2: made by version r.1.7, which was abandoned"),
        (
            mixed((0, "r.2.5"), (1, "x.0.0"), (2, "r.2.6")),
            "tokens 1 to 1: made by version x.0.0, which is none of run r",
        ),
        (mixed((0, "r.2.5"), (1, "mixed")), "tokens 1 to 3: made by version mixed, which is none of run r"),
        (mixed((0, "r.2.5"), (4, "r.2.6")), "versions of tokens must begin at 0, rise, and stay below 4 tokens"),
        (mixed((1, "r.2.5"), (2, "r.2.6")), "versions of tokens must begin at 0"),
        (FOUR | {"response_versions": "x"}, "versions of tokens must be JSON"),
        (
            mixed((0, "r.2.5"), (1, "r.2.6")) | {"model_version": None} | tokens([1], [], []),
            "versions of tokens must begin at 0, rise, and stay below 0 tokens",
        ),
    ],
)
def test_a_turn_with_a_token_of_a_wrong_version_is_not_trained_on_and_says_why(
    turn: dict[str, object], why: str
) -> None:
    group, oldest = checked(Group("g", (finished("r", [turn]),)), lineage())
    (triplet,) = group.members[0].triplets
    assert not triplet.trainable
    assert triplet.reason is not None
    assert triplet.reason.startswith(f"turn 0: {why}")
    assert oldest is None
