"""verl's trainer on our log: tasks go out as groups of rollouts, and what ends comes back as rows of its batches.

Runs in one process of the job, the task runner. `Trainer` (``register_trainer``), `Rollouts` (the agent loop manager)
and `Mark` (``CheckpointCallback``) are three of verl's extension points; nothing in verl is patched.
"""

import asyncio
import json
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractAsyncContextManager, suppress
from pathlib import Path
from threading import Event
from typing import Any, Protocol

import ray
import torch
import transfer_queue as tq
from tensordict import TensorDict
from verl.trainer.ppo.checkpoint_callback import CheckpointCallback
from verl.trainer.ppo.v1.trainer_base import PPOTrainer, register_trainer
from verl.utils import tensordict_utils
from verl.utils.debug import marked_timer
from verl.workers.rollout.replica import RolloutReplica, RolloutReplicaRegistry

from millstream.pipeline.algorithms.estimators import grpo
from millstream.pipeline.algorithms.verl.config import MARK, NAME, Job, mark_of
from millstream.pipeline.algorithms.verl.exchange import Exchange
from millstream.pipeline.algorithms.verl.rows import (
    GroupRows,
    Row,
    RowRules,
    asked_with,
    rollouts_of,
    rows_of,
    token_advantages,
    uid_of,
)
from millstream.pipeline.training.groups import FinishedRollout, Group
from millstream.pipeline.training.report import failures, mean_reward
from millstream.producers.files import write_atomically
from millstream.producers.supervisor import Supervisor
from millstream.schemas.errors import BackgroundFailed, MillstreamError

logger = logging.getLogger(__name__)

POLL_S = 0.05  # of verl's replay buffer, whose own is 2 s: a look at tags in memory
PARTITION = "train"
# Fields of rows by the type of their tensors; the others are no tensors.
TENSORS = {
    torch.int64: ("prompts", "responses", "response_mask", "loss_mask", "input_ids", "position_ids"),
    torch.float32: ("rollout_log_probs", "rm_scores"),
}


class Groups(Protocol):
    """The part of a run that rollouts come from."""

    async def group(self, task: str, size: int, key: str, *, resources_id: str = "") -> Group: ...

    def release(self, groups: Iterable[Group]) -> None: ...

    async def give_up(self, size: int, key: str, resources_id: str) -> None: ...

    def positions(self) -> dict[int, int]: ...


class Rollouts:
    """Asks for a group of rollouts for each prompt of verl, and puts its rows into verl's TransferQueue.

    Groups run on an event loop in a thread of its own. If one of its tasks fails, all open groups count as failed:
    verl then asks for others, and gets the error.
    """

    def __init__(self, connect: Callable[[], AbstractAsyncContextManager[Groups]], job: Job, rules: RowRules) -> None:
        self._connect = connect
        self._job = job
        self._rules = rules
        self._exchange = Exchange(job.folder, job.attempt)
        self._steps: dict[str, int] = {}  # open groups: the step that has asked for each
        self._reasons: Counter[str] = Counter()  # of groups that failed since the last one that didn't
        self._members: list[FinishedRollout] = []  # that have ended since the last step
        self._dropped = 0  # groups, since the last step
        self._putting = asyncio.Lock()
        self._groups: Groups
        self._loop: asyncio.AbstractEventLoop
        self._stop: asyncio.Event
        self._connected = Event()
        self._supervisor = Supervisor(self._give_up)
        self._thread = self._supervisor.thread("rollouts", lambda: asyncio.run(self._serve()))
        while not self._connected.wait(0.1):
            self._raise_failure()

    @property
    def open(self) -> list[str]:
        """The uids of groups that have not ended."""
        return sorted(self._steps)

    def generate_sequences(self, batch: TensorDict) -> None:
        """Asks for a group for each prompt of the batch, and doesn't wait. Raises what ended the groups before."""
        self._raise_failure()
        step = int(_plain(batch["global_steps"]))
        for uid, task in zip(map(_plain, batch["uid"]), map(_plain, batch["raw_prompt"]), strict=True):
            self._steps[uid] = step
            self._loop.call_soon_threadsafe(self._start, uid, task, step)

    def take_metrics(self) -> dict[str, float]:
        """Of the groups that have ended since the last call."""
        members, self._members = self._members, []
        dropped, self._dropped = self._dropped, 0
        return {
            "millstream/reward": mean_reward(members),
            "millstream/rollouts": float(len(members)),
            "millstream/failed": float(failures(members)),
            "millstream/spans": float(sum(member.end.spans for member in members)),
            "millstream/dropped_groups": float(dropped),
        }

    def positions(self) -> dict[int, int]:
        """Where to read on, to find what the open groups have ended with."""

        async def found() -> dict[int, int]:
            return self._groups.positions()

        return asyncio.run_coroutine_threadsafe(found(), self._loop).result()

    def close(self, done: bool) -> None:
        """Cancels the open groups if the run is ``done``. Else they are left for a job that resumes."""
        self._supervisor.close()
        if not self._thread.is_alive():
            return
        if done:
            asyncio.run_coroutine_threadsafe(self._cancel(), self._loop).result()
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join()

    async def _cancel(self) -> None:
        for uid in self.open:
            if (served := self._exchange.served_by(*asked_with(uid))) is not None:
                await self._groups.give_up(self._job.options.group_size, uid, served.resources_id)

    async def _serve(self) -> None:
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        async with self._connect() as self._groups:
            self._connected.set()
            await self._stop.wait()

    def _start(self, uid: str, task: str, step: int) -> None:
        self._supervisor.job(f"group {uid}", self._group(uid, task, step))

    async def _group(self, uid: str, task: str, step: int) -> None:
        options = self._job.options
        attempt, asked = asked_with(uid)
        served = self._exchange.served_by(attempt, asked)
        assert served is not None  # a step's prompts are drawn once its weights are served
        group, found = None, GroupRows((), (f"it has not ended within {options.group_timeout_s:g} s",))
        with suppress(TimeoutError):
            async with asyncio.timeout(options.group_timeout_s):
                group = await self._groups.group(task, options.group_size, uid, resources_id=served.resources_id)
        if group is not None:
            found = await asyncio.to_thread(rows_of, group, uid, step, self._exchange.lineage(), self._rules)
        async with self._putting:  # verl's client is made for one thread at a time
            await asyncio.to_thread(_put, uid, step, found.rows)
        del self._steps[uid]
        if group is None:
            await self._groups.give_up(options.group_size, uid, served.resources_id)
        else:
            self._members += group.members
            self._groups.release([group])
        if found.rows:
            self._reasons.clear()
        else:
            self._dropped += 1
            self._note_failure(uid, found.reasons)

    def _note_failure(self, uid: str, reasons: Sequence[str]) -> None:
        """Raises `MillstreamError` once as many groups in a row have failed as a step has."""
        logger.warning("group %s is not trained on: %s", uid, "; ".join(reasons))
        ((reason, _),) = Counter(each.partition(": ")[2] or each for each in reasons).most_common(1)
        self._reasons[reason] += 1
        failed = self._reasons.total()
        if failed >= self._job.options.groups_per_step:
            ((commonest, times),) = self._reasons.most_common(1)
            raise MillstreamError(
                f"none of the last {failed} groups could be trained on; commonest reason ({times} times): {commonest}"
            )

    def _give_up(self, failure: BackgroundFailed) -> None:
        for uid, step in list(self._steps.items()):
            _put(uid, step, ())

    def _raise_failure(self) -> None:
        if self._supervisor.failure is not None:
            raise self._supervisor.failure


def _put(uid: str, step: int, rows: Sequence[Row]) -> None:
    """Ends a group for verl. One without rows is a failure: verl draws another prompt in its place."""
    if rows:
        tq.kv_batch_put(
            keys=[row.key for row in rows],
            fields=tensordict_utils.list_of_dict_to_tensordict([_tensors(row) for row in rows]),
            tags=[dict(row.tag) for row in rows],
            partition_id=PARTITION,
        )
    status = "finished" if rows else "failure"
    tq.kv_put(key=uid, partition_id=PARTITION, tag={"is_prompt": True, "status": status, "global_steps": step})


def _tensors(row: Row) -> dict[str, Any]:
    tensors = {name: torch.tensor(row.fields[name], dtype=kind) for kind, names in TENSORS.items() for name in names}
    return {**row.fields, **tensors}


def _plain(value: Any) -> Any:
    """What tensordict holds a value in that is no tensor, undone."""
    return getattr(value, "data", value)


RolloutReplicaRegistry.register(NAME, lambda: RolloutReplica)  # verl looks it up by name, and starts none


@register_trainer(NAME)
class Trainer(PPOTrainer):  # type: ignore[misc] # verl has no types
    """verl's trainer with our uids, our advantages, and weights that we serve."""

    _enable_hybrid_replicas = False

    def __init__(self, config: Any, job: Job) -> None:
        self.job = job
        self.drawn = 0  # prompts
        self.positions: dict[int, int] = {}  # at the checkpoint that is being written
        self._exchange = Exchange(job.folder, job.attempt)
        self._draws_for = job.attempt  # a start: this one, or for one step that which has drawn its prompts before
        if job.resume_from is not None:
            mark = mark_of(job.resume_from)
            assert mark is not None
            self.drawn = mark["drawn"]
            if self._exchange.served_by(mark["attempt"], mark["step"]) is not None:
                self._draws_for = mark["attempt"]
        super().__init__(config)

    def on_init_end(self) -> None:
        self._publish()

    def on_train_begin(self) -> None:
        self._add_async_warmup_batches(self.job.options.ahead)

    def on_sample_end(self) -> None: ...

    def on_step_end(self) -> None:
        with marked_timer("update_weights", self.timing_raw):
            metrics = self._publish()
        self._draws_for = self.job.attempt
        self._pending_sync_metrics = metrics | self.agent_loop_manager.take_metrics()

    def _publish(self) -> dict[str, float]:
        """Returns once the weights are served."""
        metrics: dict[str, float] = ray.get(
            self.actor_rollout_wg.update_weights(global_steps=self.global_steps, mode=NAME)
        )[0]
        if self._exchange.wait_until_served(self.global_steps).stop:
            self.total_training_steps = self.global_steps
        return metrics

    def _build_replay_buffer(self) -> Any:
        buffer = super()._build_replay_buffer()
        buffer.poll_interval = POLL_S
        return buffer

    def _fetch_one_gen_batch(self) -> TensorDict:
        """A prompt's uid follows from its number. The prompts of the first step after a resume were drawn before, by
        the start that has saved: they get the uids of then, so rollouts that have run since are recognised. Later steps
        had other weights then: what they have sampled is not used again."""
        batch = super()._fetch_one_gen_batch()
        asked = self.global_steps - 1  # updates
        uids = [uid_of(self._draws_for, asked, self.drawn + n) for n in range(len(batch))]
        self.drawn += len(batch)
        tensordict_utils.assign_non_tensor_stack(batch, "uid", uids)
        return batch

    def _save_checkpoint(self) -> None:
        # Before verl saves what has ended: what ends meanwhile is read again.
        self.positions = self.agent_loop_manager.positions()
        super()._save_checkpoint()

    def _balance_batch(self, batch: Any, *args: Any, **kwargs: Any) -> Any:
        """In the order of keys, whatever ended first: sums of floats depend on the order of rows."""
        batch.reorder(sorted(range(len(batch.keys)), key=batch.keys.__getitem__))
        return super()._balance_batch(batch, *args, **kwargs)

    def _compute_advantage(self, batch: Any, metrics: dict[str, Any]) -> Any:
        """Replaces the advantages of verl's GRPO, which takes the last row of a rollout for all of it, by ours. What
        verl adds to a batch here besides (penalties, importance weights) stays."""
        batch = super()._compute_advantage(batch, metrics)
        self._exchange.note_trained(self.global_steps, rollouts_of(batch.keys, batch.tags))
        if self.job.options.advantage != "turns":
            return batch
        found = [torch.tensor(row) for row in token_advantages(batch.keys, batch.tags, grpo)]
        nested = torch.nested.as_nested_tensor(found, layout=torch.jagged)
        fields = TensorDict({"advantages": nested, "returns": nested}, batch_size=len(batch.keys))
        return tq.kv_batch_put(keys=batch.keys, partition_id=batch.partition_id, fields=fields)


class Mark(CheckpointCallback):  # type: ignore[misc] # verl has no types
    """Writes our part of a checkpoint, last: a checkpoint that has it is complete."""

    def on_save(self, trainer: Trainer, global_step: int, checkpoint_dir: str, **_: Any) -> None:
        mark = {
            "step": global_step,
            "attempt": trainer.job.attempt,
            "drawn": trainer.drawn,
            "open": trainer.agent_loop_manager.open,
            "positions": trainer.positions,
        }
        write_atomically(Path(checkpoint_dir) / MARK, json.dumps(mark).encode())
