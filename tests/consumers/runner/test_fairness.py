from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from millstream.consumers.runner.fairness import WeightedTurns


@given(st.lists(st.integers(0, 40), max_size=40))
def test_every_thirteen_slots_in_a_row_are_dealt_eight_four_one(slots: list[int]) -> None:
    turns = WeightedTurns()
    dealt: Counter[str] = Counter()
    for n in slots:
        share = turns.take(n)
        assert sum(share.values()) == n
        dealt.update(share)
        whole = sum(dealt.values()) / 13
        for priority, weight in (("high", 8), ("normal", 4), ("low", 1)):
            assert abs(dealt[priority] - weight * whole) < 1.5
