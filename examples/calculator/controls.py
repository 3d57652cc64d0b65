"""A control for the demo: with an adapter that takes every reward away, nothing may be learnt."""

from dataclasses import replace

from millstream.consumers.adapter.triplets import Trace, to_triplets
from millstream.schemas.wire.records import Triplet


def zero_rewards(trace: Trace) -> list[Triplet]:
    """The usual triplets, each with a reward of 0. The rollout's own reward stays true."""
    return [replace(triplet, reward=0.0) for triplet in to_triplets(trace)]
