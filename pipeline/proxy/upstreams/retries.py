"""Retries of a model call: how often, how soon, and at which replica."""

import asyncio
import random

from millstream.pipeline.proxy.upstreams.replicas import Failed, Replica, Replicas


class Tries:
    """One call's tries, with a pause between two of them."""

    def __init__(self, replicas: Replicas, rollout_id: str, deadline: float) -> None:
        """``deadline`` is of the replicas' clock."""
        self._replicas = replicas
        self._last: Failed | None = None
        self._rollout_id = rollout_id
        self._deadline = deadline
        self._clock = replicas.clock
        self.number = 0  # of the present try, from 1
        self._pause_s = 0.0  # before the next one, at least
        self._replica: Replica | None = None

    @property
    def last(self) -> Failed:
        """The last try's failure."""
        return self._last or Failed(f"no replica of {self._replicas.name} can be reached", status=503)

    async def next(self) -> Replica | None:
        """The replica to try now; None after enough tries, or when no time is left."""
        policy = self._replicas.policy
        while self.number < policy.tries:
            if self.number:
                backoff = min(policy.max_backoff_s, policy.backoff_s * 2 ** (self.number - 1))
                pause = max(self._pause_s, random.uniform(0, backoff))  # noqa: S311 - a jitter
                if self._clock() + pause > self._deadline:
                    return None
                await asyncio.sleep(pause)
            if not await self._replicas.wait_for_one(self._deadline):
                return None
            self.number += 1
            avoid = () if self._replica is None else (self._replica,)
            self._replica = self._replicas.pick(self._rollout_id, avoid)
            if self._replica is not None:
                return self._replica
            self._pause_s = self._replicas.cooldown_left_s()
        return None

    def failed(self, error: Failed) -> None:
        """The replica that `next` returned has failed."""
        self._last, self._pause_s = error, error.retry_after_s
        assert self._replica is not None
        self._replicas.failed(self._replica, error)

    def succeeded(self) -> None:
        assert self._replica is not None
        self._replicas.succeeded(self._replica)
