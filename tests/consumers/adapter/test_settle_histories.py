"""Whatever is claimed, written late, delivered twice or restarted, and in whatever order: one end for each rollout."""

from collections import Counter

from factories import event, span, task
from hypothesis import given
from hypothesis import strategies as st

from millstream.consumers.adapter.settle import PartitionFold
from millstream.consumers.adapter.triplets import to_triplets
from millstream.schemas.wire import codec, status
from millstream.schemas.wire.log import LogRecord, Partition
from millstream.schemas.wire.records import RolloutEnd, Settled
from millstream.schemas.wire.settled import packed

ROLLOUTS = 3


class World:
    """Runners and an adapter on one partition. Tasks may be delivered again and claims written late, after any time.
    The adapter commits up to its oldest open rollout and restarts from there."""

    def __init__(self, random):
        self.random = random
        self.delivers_again = True
        self.log = []
        self.settled = []
        self.clock = 0.0
        self.tasks = [
            task(max_attempts=random.randint(1, 3), max_lost_attempts=random.randint(0, 2), lease_s=10.0)
            for _ in range(ROLLOUTS)
        ]
        self.queue = list(self.tasks)
        self.published = []  # retries
        self.claims = []
        self.committed = 0
        self.restart()

    def append(self, value):
        kind = value.status.encode() if hasattr(value, "status") else b"span"
        record = LogRecord(Partition("e", 0), len(self.log), 0, value.rollout_id, codec.encode(value), {"kind": kind})
        self.log.append((record, value))

    def claim(self):
        if self.queue:
            of = self.random.choice(self.queue)
            if not self.delivers_again or self.random.random() < 0.8:
                self.queue.remove(of)
            self.claims.append((of, f"a{len(self.claims)}"))
            self.append(event(*self.claims[-1], status.PREPARING))

    def come_back(self):
        """A runner that was frozen claims a task that it polled long ago; a publisher sends one again."""
        self.clock += self.random.choice([1.0, 1e3, 1e6])
        self.claims.append((self.random.choice([*self.tasks, *self.published]), f"a{len(self.claims)}"))
        self.append(event(*self.claims[-1], status.PREPARING))

    def happen(self):
        """An attempt writes something, whether it lives or not."""
        if self.claims:
            of, attempt = self.random.choice(self.claims)
            what = self.random.choice([status.RUNNING, "span", *sorted(status.TERMINAL)])
            self.append(span(of, attempt) if what == "span" else event(of, attempt, what))

    def read(self):
        for _ in range(self.random.randint(1, 10)):
            if self.position < len(self.log):
                self.fold.apply(self.log[self.position][0], self.clock)
                self.position += 1

    def expire(self):
        self.clock += self.random.uniform(0, 15)
        self.fold.expire(self.clock, 0.0, 1)

    def write(self):
        """One transaction."""
        box = [item for item in self.fold.ready(self.clock) if self.random.random() < 0.8]
        for _, decision in box:
            self.append(decision.retry.mark if decision.retry else decision.end)
            if decision.retry:
                self.queue.append(decision.retry.task)
                self.published.append(decision.retry.task)
            self.settled.append(Settled(marks=packed(decision.marks)))
        oldest = self.fold.oldest_open({rollout_id for rollout_id, _ in box})
        self.committed = self.position if oldest is None else min(self.position, oldest)
        for rollout_id, _ in box:
            self.fold.written(rollout_id)

    def restart(self):
        self.fold = PartitionFold(to_triplets, random=self.random.random)
        for settled in self.settled:
            self.fold.load(settled, 0, self.committed)
        self.position = self.committed


@given(st.randoms(use_true_random=False))
def test_every_rollout_ends_once_and_is_not_retried_afterwards(random):
    world = World(random)
    actions = [
        world.claim,
        world.happen,
        world.happen,
        world.read,
        world.read,
        world.write,
        world.expire,
        world.restart,
        world.come_back,
    ]
    for _ in range(random.randint(0, 120)):
        random.choice(actions)()
    for _ in range(300):  # what is left comes to its end
        world.clock += 100.0
        while world.position < len(world.log):
            world.read()
        world.fold.expire(world.clock, 0.0, 1)
        world.write()
        world.delivers_again = False
        world.claim()

    ended, retried, published = set(), Counter(), Counter()
    for _, value in world.log:
        if isinstance(value, RolloutEnd):
            assert value.rollout_id not in ended
            ended.add(value.rollout_id)
        elif getattr(value, "status", "") == status.RETRY:
            assert value.rollout_id not in ended
            retried[value.rollout_id, value.attempt] += 1
    assert ended == {of.rollout_id for of in world.tasks}
    assert set(retried.values()) <= {1}
    for of in world.tasks:
        published = [attempt for rollout_id, attempt in retried if rollout_id == of.rollout_id]
        assert published == list(range(1, len(published) + 1))
        assert len(published) < of.max_attempts + of.max_lost_attempts
    assert (world.fold.open, world.fold.decided, world.fold.size) == ({}, {}, 0)
