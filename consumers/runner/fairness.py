"""How free slots are shared among the priorities."""

from millstream.schemas.wire.topics import PRIORITIES, PRIORITY_WEIGHTS


class WeightedTurns:
    """Shares slots among the priorities by weight. Of each 13 in a row high gets 8, normal 4, low 1, however few are
    taken at a time: smooth weighted round-robin, as in nginx."""

    def __init__(self) -> None:
        self._credit = dict.fromkeys(PRIORITIES, 0)

    def take(self, slots: int) -> dict[str, int]:
        """How many of the next ``slots`` each priority gets."""
        shares = dict.fromkeys(PRIORITIES, 0)
        total = sum(PRIORITY_WEIGHTS.values())
        for _ in range(slots):
            for priority, weight in PRIORITY_WEIGHTS.items():
                self._credit[priority] += weight
            chosen = max(PRIORITIES, key=self._credit.__getitem__)
            self._credit[chosen] -= total
            shares[chosen] += 1
        return shares
