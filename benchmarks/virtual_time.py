"""What it brings to ask for rollouts in advance, without the noise of a machine: the same training with staleness 0, 1
and 4, in virtual time.

    python benchmarks/virtual_time.py [--quick] [--json FILE] [--seeds N]

The trainer's own loop, pacing and learner, on an event loop whose clock jumps to the next timer. The calculator's
calls take lognormal times (mean 2 s, σ 1), 256 rollouts run at a time, and a step takes 3.3 s to learn and publish;
nothing else takes any time. Of each schedule, medians over the seeds:

- ``s_per_step``; ``trainer_idle_share``, ``runner_idle_share``: of the run's time, and of that of all slots.
- ``staleness_mean``, ``staleness_max``, ``dropped_share``: of the groups.
- ``steps_to_learn``, ``s_to_learn``: until 0.9 of the held-out questions' steps are right (not with --quick).
- ``reward``: of the held-out questions after the last step, which is the same for all schedules.

``async_to_sync_virtual`` is ``s_to_learn`` of staleness 4 in units of staleness 0; ``async_to_sync_step`` the same of
``s_per_step``. ``control_reward``: with staleness 4 and a learning rate of 0.
"""

import asyncio
import json
import math
import random
import statistics
import tempfile
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Final

import torch
from training import LEARNT, SIGMA, SLOTS, STALENESS, of_groups, options, tell

from examples.calculator import model
from examples.calculator.tasks import make_tasks
from examples.calculator.tools import TOOLS
from millstream.pipeline.algorithms.policy_gradient import PolicyGradient
from millstream.pipeline.algorithms.torch_learner import TorchLearner
from millstream.pipeline.models.policy import left_pad, load_model, load_tokenizer
from millstream.pipeline.training.groups import FinishedRollout, Group, Lineage
from millstream.pipeline.training.reporting.stopwatch import Stopwatch
from millstream.pipeline.training.run import Experiment, StopRule
from millstream.schemas.wire.records import RolloutEnd, Triplet

CALL_MEAN_S: Final = 2.0
STEP_S: Final = 3.3
HELD_OUT: Final = 64


class VirtualLoop(asyncio.SelectorEventLoop):
    """Its clock jumps to the next timer when nothing else is left to do."""

    def __init__(self) -> None:
        super().__init__()
        self._now = 0.0
        self.set_default_executor(InPlace())

    def time(self) -> float:
        return self._now

    def _run_once(self) -> None:
        if not self._ready and self._scheduled:
            self._now = max(self._now, self._scheduled[0].when())
        super()._run_once()


class InPlace(ThreadPoolExecutor):
    """Calls at once what others call in a thread: computing takes no virtual time."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        done: Future[Any] = Future()
        try:
            done.set_result(fn(*args, **kwargs))
        except BaseException as error:
            done.set_exception(error)
        return done


class Policy:
    """The weights that are served, and what they say."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.model = load_model(folder).eval()
        self.tokenizer = load_tokenizer(folder)
        self.generator = torch.Generator().manual_seed(seed)
        self._known: dict[tuple[int, ...], torch.Tensor] = {}  # prompt → log-probabilities, of these weights

    def load(self, weights: Mapping[str, torch.Tensor]) -> None:
        self.model.load_state_dict(dict(weights), strict=False)
        self._known.clear()

    @torch.inference_mode()
    def logprobs(self, prompts: Sequence[tuple[int, ...]]) -> list[torch.Tensor]:
        """Of each prompt's next token: float32 tensors of the vocabulary's size."""
        if new := [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._known]:
            logits = self.model(**left_pad(new), use_cache=False, logits_to_keep=1).logits[:, -1]
            self._known |= dict(zip(new, torch.log_softmax(logits.float(), -1), strict=True))
        return [self._known[prompt] for prompt in prompts]

    def sample(self, prompt: tuple[int, ...]) -> tuple[int, float]:
        """A token and its log-probability."""
        (logprobs,) = self.logprobs([prompt])
        token = int(torch.multinomial(logprobs.exp(), 1, generator=self.generator))
        return token, float(logprobs[token])

    def prompt(self, messages: list[dict[str, str]]) -> tuple[int, ...]:
        return tuple(self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False))


class Conversation:
    """A rollout of `examples.calculator.agent`, turn by turn."""

    def __init__(self, policy: Policy, task: dict[str, Any]) -> None:
        self.policy, self.task = policy, task
        self.parts = task["question"].split(" then ")
        self.result, *self.operands = task["numbers"]
        self.messages: list[dict[str, str]] = []
        self.rewards: list[float] = []

    def ask(self) -> tuple[int, ...]:
        """The next turn's prompt."""
        part = self.parts[len(self.rewards)]
        asked = f"result {self.result} . then {part} ?" if self.rewards else f"{part} ?"
        self.messages.append({"role": "user", "content": asked})
        return self.policy.prompt(self.messages)

    def answer(self, token: int) -> None:
        word = self.policy.tokenizer.decode([token], skip_special_tokens=True).strip()
        step = len(self.rewards)
        if word in TOOLS:
            self.result = TOOLS[word](self.result, self.operands[step])
        self.rewards.append(0.5 * (word == self.task["tools"][step]))
        self.messages.append({"role": "assistant", "content": word})


class VirtualRun:
    """What a `PolicyGradient` uses of a `Run`, with rollouts that sleep."""

    restored = None
    continues = False
    resources_id = ""

    def __init__(self, policy: Policy, seed: int, steps: int, loop: asyncio.AbstractEventLoop) -> None:
        tasks = [json.dumps(task) for task in make_tasks(2000, "train", seed)]
        self.experiment = Experiment("calculator", seed, tasks, stop=StopRule(steps))
        self.seed, self.loop, self.policy = seed, loop, policy
        self.lineage = Lineage("calculator")
        self.watch = Stopwatch(loop.time, lambda: 0)
        self.summary = SimpleNamespace(rollouts=0, spans=0)
        self.seconds = math.inf  # of which a rate is reported that nobody reads
        self.reports: list[Any] = []
        self.held_out: list[tuple[float, float]] = []  # virtual seconds, reward, after each step
        self.busy_s = 0.0
        self._slots = asyncio.Semaphore(SLOTS)
        self._random = random.Random(seed)
        self._questions = make_tasks(HELD_OUT, "val", seed)

    async def publish_weights(self, weights: Mapping[str, torch.Tensor], step: int) -> None:
        if step:
            await asyncio.sleep(STEP_S)
        self.policy.load(weights)
        self.lineage.step = step
        self.held_out.append((self.loop.time(), self._validate()))

    def _validate(self) -> float:
        """Greedy."""
        conversations = [Conversation(self.policy, task) for task in self._questions]
        for _ in range(2):
            for conversation, logprobs in zip(
                conversations, self.policy.logprobs([each.ask() for each in conversations]), strict=True
            ):
                conversation.answer(int(logprobs.argmax()))
        return statistics.fmean(sum(conversation.rewards) for conversation in conversations)

    async def group(self, task: str, size: int, key: str, *, on_published: Callable[[], None], **_: Any) -> Group:
        on_published()
        members = await asyncio.gather(*(self._rollout(json.loads(task), f"{key}/{n}", key, size) for n in range(size)))
        return Group(key, tuple(members))

    async def _rollout(self, task: dict[str, Any], rollout_id: str, group_id: str, size: int) -> FinishedRollout:
        triplets = []
        async with self._slots:
            conversation = Conversation(self.policy, task)
            for turn in range(len(conversation.parts)):
                wait_s = CALL_MEAN_S * self._random.lognormvariate(-SIGMA * SIGMA / 2, SIGMA)
                self.busy_s += wait_s
                await asyncio.sleep(wait_s)
                prompt = conversation.ask()
                token, logprob = self.policy.sample(prompt)
                version = self.lineage.version
                conversation.answer(token)
                triplets.append(
                    Triplet(
                        rollout_id=rollout_id,
                        attempt_id="",
                        group_id=group_id,
                        turn=turn,
                        span_id=str(turn),
                        prompt="",
                        response="",
                        prompt_token_ids=torch.tensor(prompt, dtype=torch.int32).numpy().tobytes(),
                        response_token_ids=torch.tensor([token], dtype=torch.int32).numpy().tobytes(),
                        response_logprobs=torch.tensor([logprob]).numpy().tobytes(),
                        reward=conversation.rewards[-1],
                        model_version=version,
                    )
                )
        end = RolloutEnd(
            rollout_id=rollout_id,
            group_id=group_id,
            group_size=size,
            status="succeeded",
            attempts=1,
            reward=sum(conversation.rewards),
            created_at=0,
            ended_at=0,
        )
        return FinishedRollout(end, tuple(triplets))

    def add(self, report: Any, trained: Any) -> None:
        self.reports.append((report, self.watch.lap().phases))

    async def tell(self) -> None:
        pass

    async def give_up(self, *_: Any) -> None:
        pass

    async def checkpoint(self, *_: Any, **__: Any) -> None:
        pass

    async def export(self, *_: Any) -> None:
        pass

    def count(self, members: Any) -> None:
        pass

    def release(self, groups: Any) -> None:
        pass

    def all_expected(self) -> None:
        pass

    def note_abandoned(self) -> None:
        pass


def play(make: Callable[[Path], PolicyGradient], seed: int, steps: int) -> tuple[VirtualRun, float]:
    """Trains the calculator with the algorithm that is made from its model's folder. Returns the run, and how many
    virtual seconds it took."""
    with tempfile.TemporaryDirectory() as folder:
        model.create(folder, seed)
        algorithm = make(Path(folder))
        policy = Policy(Path(folder), seed)
    loop = VirtualLoop()
    asyncio.set_event_loop(loop)
    run = VirtualRun(policy, seed, steps, loop)
    loop.run_until_complete(algorithm.run(run))  # type: ignore[arg-type]
    loop.close()
    return run, loop.time()


def train(staleness: int, seed: int, steps: int, lr: float = 1e-3) -> dict[str, float]:
    def make(folder: Path) -> PolicyGradient:
        return PolicyGradient(TorchLearner(folder, seed=seed, lr=lr), max_staleness=staleness)

    run, seconds = play(make, seed, steps)
    reports = [report for report, _ in run.reports]
    spent = [phases for _, phases in run.reports]
    learnt = next((n for n, (_, reward) in enumerate(run.held_out) if reward >= LEARNT), None)
    return {
        "s_per_step": seconds / steps,
        "trainer_idle_share": sum(phases["wait"] for phases in spent) / seconds,
        "runner_idle_share": 1 - run.busy_s / (SLOTS * seconds),
        **of_groups(reports),
        "steps_to_learn": math.nan if learnt is None else float(learnt),
        "s_to_learn": math.nan if learnt is None else run.held_out[learnt][0],
        "reward": run.held_out[-1][1],
    }


def main() -> None:
    given = options(__doc__, seeds=5)
    torch.set_num_threads(1)
    steps, seeds = (2, 1) if given.quick else (40, given.seeds)
    found: dict[int, list[dict[str, float]]] = {staleness: [] for staleness in STALENESS}
    for seed in range(seeds):
        for staleness in STALENESS:
            found[staleness].append(train(staleness, seed, steps))
            print(f"seed {seed}, staleness {staleness}:", {k: round(v, 3) for k, v in found[staleness][-1].items()})
    tell(found, train(STALENESS[-1], 0, min(steps, 15), lr=0.0)["reward"], "virtual", given)


if __name__ == "__main__":
    main()
