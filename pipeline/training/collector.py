"""Collects the ends of rollouts, with the triplets that come before them."""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import count

from millstream.consumers.dead_letters import dead_letter, send_dead_letter
from millstream.consumers.log.port import Log
from millstream.pipeline.training.groups import FinishedRollout
from millstream.producers.log.port import Producer
from millstream.producers.log_lines import rollout_fields
from millstream.producers.supervisor import Background, supervisor
from millstream.schemas.errors import CodecError, LogError, LogUnavailable
from millstream.schemas.ids import written_since_ms
from millstream.schemas.wire import codec, status
from millstream.schemas.wire.log import KIND_HEADER, LogRecord, Partition
from millstream.schemas.wire.prefixes import expand
from millstream.schemas.wire.records import RolloutEnd, Triplet
from millstream.schemas.wire.topics import LIFETIMES, Topics

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class CollectorPolicy:
    poll_records: int = 2000
    poll_s: float = 1.0  # how long a poll waits for records; it does not delay what is there
    retry_s: float = 0.5  # before the next poll after one that failed
    early_rollouts: int = 10_000  # that are kept of a predecessor: more than a run has open
    # After it the log may have dropped a rollout's task or end: no end that has not been read will come.
    wait_s: float = LIFETIMES.record_s


class Collector:
    """Reads the triplets topic by manual assignment while it is open.

    Ignores records of rollouts that are not expected: other trainers', or collected before. Knows the first record of
    each rollout that it holds, so a successor can read again what has not been trained on.
    """

    def __init__(
        self, log: Log, topics: Topics, producer: Producer, policy: CollectorPolicy = CollectorPolicy()
    ) -> None:
        self._policy = policy
        self._topics = topics
        self._producer = producer  # for dead letters
        self._consumer = log.consumer()
        self._partitions = [Partition(topics.triplets, n) for n in range(topics.partitions)]
        self._outstanding: dict[str, float] = {}  # rollout → when it began, by the monotonic clock
        self._ends: dict[str, asyncio.Future[FinishedRollout]] = {}  # of all that are held
        self._first: dict[str, tuple[int, int]] = {}  # rollout → partition and offset of its first record
        self._triplets: dict[str, list[Triplet]] = {}
        self._experiment_id: str | None = None  # of a predecessor
        self._early: dict[str, list[LogRecord]] = {}  # of its rollouts that are not expected yet
        self._reading: Background | None = None

    async def start(self, positions: Mapping[int, int] | None = None, experiment_id: str | None = None) -> bool:
        """Starts reading at the end of the topic, or at a predecessor's `positions`. Call it before the first task is
        published: nothing after it is missed. What it then reads of the predecessor's experiment before it is expected
        is kept until `all_expected`. Names a gap between a position and the first record that is left.

        False if the log is not the one of these positions: then it reads from the beginning."""
        await self._consumer.assign(self._partitions, "end" if positions is None else "beginning")
        continued = positions is not None
        if positions is not None:
            first = await self._consumer.beginning_offsets(self._partitions)
            ends = await self._consumer.end_offsets(self._partitions)
            continued = all(positions.get(p.number, 0) <= ends[p] for p in self._partitions)
            for partition in self._partitions if continued else ():
                wanted = positions.get(partition.number, 0)
                if wanted < first[partition]:
                    logger.error(
                        "%s: offsets %d to %d were deleted before they were trained on (retention); rollouts that "
                        "ended there are given up",
                        partition,
                        wanted,
                        first[partition] - 1,
                    )
                await self._consumer.seek(partition, max(wanted, first[partition]))
        self._experiment_id = experiment_id if continued else None
        self._reading = supervisor().loop("collector", self._read())
        return continued

    def expect(self, rollout_ids: Sequence[str]) -> None:
        """Holds these rollouts until `release`. Call it before they are published. They count as old as their ids say:
        those of a predecessor may have been dropped by the log."""
        for rollout_id in rollout_ids:
            if rollout_id not in self._ends:
                age_s = time.time() - written_since_ms(rollout_id) / 1000 if written_since_ms(rollout_id) else 0.0
                self._outstanding[rollout_id] = time.monotonic() - age_s
                self._ends[rollout_id] = asyncio.get_running_loop().create_future()
                for record in self._early.pop(rollout_id, ()):
                    self._take(record)

    def all_expected(self) -> None:
        """Nothing of a predecessor will be expected any more."""
        self._experiment_id = None
        self._early.clear()

    @property
    def outstanding(self) -> frozenset[str]:
        return frozenset(self._outstanding)

    def positions(self) -> dict[int, int]:
        """The next offset to read by partition, if what is held now were to be read again."""
        found = {p.number: self._consumer.position(p) or 0 for p in self._partitions}
        for partition, offset in self._first.values():
            found[partition] = min(found[partition], offset)
        return found

    async def collect(
        self, rollout_ids: Sequence[str], progress: Callable[[int, int], None] | None = None
    ) -> list[FinishedRollout]:
        """Waits until each of these has ended; in the order given. Ends, since every published rollout does, or the log
        has dropped it: that one ends as failed here. ``progress`` is called with how many have, and of how many."""
        ends = [self._ends[rollout_id] for rollout_id in rollout_ids]
        if progress is not None:
            numbers = count(1)
            for end in ends:
                end.add_done_callback(lambda _: progress(next(numbers), len(ends)))
        if ends:
            await asyncio.wait(ends)
        return [end.result() for end in ends]

    def release(self, rollout_ids: Iterable[str]) -> None:
        """Forgets rollouts: they are trained on, or will never be."""
        for rollout_id in rollout_ids:
            self._outstanding.pop(rollout_id, None)
            self._triplets.pop(rollout_id, None)
            self._first.pop(rollout_id, None)
            end = self._ends.pop(rollout_id, None)
            if end is not None:
                end.cancel()

    async def close(self) -> None:
        if self._reading is not None:
            await self._reading.close()
        self.release(list(self._ends))
        await self._consumer.close()

    async def _read(self) -> None:
        try:
            while True:
                await self._poll()
        except Exception as error:
            for rollout_id in self._outstanding:
                self._ends[rollout_id].set_exception(error)
                self._ends[rollout_id].exception()  # it may be that nobody waits for this one
            raise

    async def _poll(self) -> None:
        try:
            batch = await self._consumer.poll(self._policy.poll_records, self._policy.poll_s)
        except LogError as error:
            text = "reading triplets failed, retrying: %s"
            await self._consumer.polls.sit_out(error, logger.warning, text, self._policy.retry_s)
            return
        for record in batch:
            self._take(record)
        late = time.monotonic() - self._policy.wait_s
        for rollout_id in [each for each, since in self._outstanding.items() if since < late]:
            days = self._policy.wait_s / 86_400
            self._give_up(rollout_id, f"its end was not read within {days:g} days; the log has dropped it by now")

    def _take(self, record: LogRecord) -> None:
        try:
            value = codec.decode(record.value)
        except CodecError as error:
            letter = dead_letter(record, "trainer", "undecodable", str(error))
            send_dead_letter(self._producer.send, self._topics, letter)
            if record.headers.get(KIND_HEADER) == b"end" and record.key in self._outstanding:
                self._give_up(record.key, f"its end can't be read: {error}")
            return
        if not isinstance(value, Triplet | RolloutEnd):
            return
        if value.rollout_id not in self._outstanding:
            if value.experiment_id == self._experiment_id and value.rollout_id not in self._ends:
                self._early.setdefault(value.rollout_id, []).append(record)
                if len(self._early) > self._policy.early_rollouts:
                    del self._early[next(iter(self._early))]
            return
        self._first.setdefault(value.rollout_id, (record.partition.number, record.offset))
        if isinstance(value, Triplet):
            self._triplets.setdefault(value.rollout_id, []).append(value)
        else:
            del self._outstanding[value.rollout_id]
            try:
                triplets = expand(self._triplets.pop(value.rollout_id, []))
            except ValueError as error:  # one was undecodable, and is a dead letter
                fields = rollout_fields(value.rollout_id)
                logger.warning("rollout %s is not trained on: %s", value.rollout_id, error, extra=fields)
                value, triplets = replace(value, trainable=False, reason=str(error)), []
            self._ends[value.rollout_id].set_result(FinishedRollout(value, tuple(triplets)))

    def _give_up(self, rollout_id: str, reason: str) -> None:
        logger.error("rollout %s is not trained on: %s", rollout_id, reason, extra=rollout_fields(rollout_id))
        del self._outstanding[rollout_id]
        self._triplets.pop(rollout_id, None)
        now = time.time_ns()
        end = RolloutEnd(
            rollout_id=rollout_id,
            group_id="",
            group_size=1,
            status=status.FAILED,
            attempts=1,
            trainable=False,
            reason=reason,
            created_at=now,
            ended_at=now,
        )
        self._ends[rollout_id].set_result(FinishedRollout(end, ()))


async def ends_of(
    log: Log,
    producer: Producer,
    topics: Topics,
    rollout_ids: Sequence[str],
    publish: Callable[[], Awaitable[None]],
    wait_s: float,
    progress: Callable[[int, int], None] | None = None,
) -> list[RolloutEnd]:
    """How these rollouts, which ``publish`` publishes, end; in the order given. ``progress`` is called with how many
    have ended, and of how many.

    Raises `LogUnavailable` naming how many have not ended within ``wait_s``: they go on.
    """
    collector = Collector(log, topics, producer)
    await collector.start()
    try:
        collector.expect(rollout_ids)
        await publish()
        async with asyncio.timeout(wait_s):
            return [finished.end for finished in await collector.collect(rollout_ids, progress)]
    except TimeoutError:
        open_ones = len(collector.outstanding)
        raise LogUnavailable(
            f"{open_ones:,} of {len(rollout_ids):,} rollouts have not ended within {wait_s:g} s, and go on: "
            "`millstream rollouts` and `millstream lag` show them"
        ) from None
    finally:
        await collector.close()
