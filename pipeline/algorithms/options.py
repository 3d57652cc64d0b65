"""The ``[algorithm]`` table of a training file: a type, and its options with their defaults. Needs no torch until an
algorithm is made."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from millstream.pipeline.algorithms.verl.config import VerlOptions
from millstream.pipeline.prompts.options import ApoTable, GepaTable, PromptTable, prompt_algorithm
from millstream.producers.blob_store import Blobs
from millstream.schemas.config.settings import Settings, load_settings
from millstream.schemas.errors import ConfigError

if TYPE_CHECKING:
    from millstream.pipeline.training.algorithm import Algorithm

# Defaults of a preset, where they differ from the fields'. "pretrained" is DAPO's training (arXiv:2503.14476, section
# 4.1): AdamW at a constant 1e-6 after a warm-up of 20 steps, each rollout seen once, no KL, no entropy bonus. Weight
# decay is that of verl's recipe of it; the critic's rate verl's for PPO.
PRESETS: Final[dict[str, dict[str, Any]]] = {
    "random": {},
    "pretrained": {
        "lr": 1e-6,
        "warmup": 20,
        "weight_decay": 0.1,
        "epochs": 1,
        "entropy": 0.0,
        "critic_lr": 1e-5,
    },
}

Clip = tuple[Annotated[float, Field(ge=0)], Annotated[float, Field(ge=0)]]


class SteadyOptions(BaseModel):
    """Of every loop: when it validates, and what it keeps."""

    model_config = ConfigDict(extra="forbid")

    validate_every: int = Field(0, ge=0, description="Steps between two validations. 0: only at the end.")
    checkpoint_every: int = Field(1, ge=1, description="Steps. Above 1 it is written while training goes on.")
    keep_checkpoints: int = Field(3, ge=1, description="The last ones.")


class RubricOptions(BaseModel):
    """Of `tracing.rubric.Rubric`: a model scores the answers of each group against each other, in place of the rewards
    that agents emit."""

    model_config = ConfigDict(extra="forbid")

    judge: str = Field(description="The model; the proxy has a route for it.")
    prompt: str = Field(
        "rubric", description="Its question in `prompts`, with {task} and {answers}; without one it is a default."
    )


class LoopOptions(SteadyOptions):
    """Of `policy_gradient.PolicyGradient`."""

    groups_per_step: int = Field(16, ge=1, description="Tasks that a step trains on.")
    group_size: int = Field(8, ge=2, description="Rollouts of each, which are compared with each other.")
    max_staleness: int = Field(
        0, ge=0, description="Steps whose rollouts are asked for in advance. 0: rollouts and training take turns."
    )
    drop_above: int | None = Field(
        None, ge=0, description="Versions by which a rollout may be older than the policy. Default: 2 max_staleness."
    )
    rubric: RubricOptions | None = Field(
        None, description="A judge of whole groups: see `[algorithm.rubric]`. Default: agents' own rewards."
    )


class LearnerOptions(BaseModel):
    """Of `torch_learner.TorchLearner`. The defaults suit a small model with random weights; those of a ``preset`` take
    their place, and what is given takes precedence."""

    model_config = ConfigDict(extra="forbid")

    choices: ClassVar[dict[str, Any]] = {}  # what makes the type: arguments of `TorchLearner`
    presets: ClassVar[dict[str, dict[str, Any]]] = PRESETS

    model: Path = Field(description="Hugging Face folder of the policy.")
    preset: Literal["random", "pretrained"] = Field("random", description="The model's weights at the beginning.")
    lr: float = Field(5e-4, ge=0, description="Learning rate.")
    schedule: Literal["constant", "linear", "cosine"] = Field("constant", description="The others fall to 0.")
    warmup: int = Field(0, ge=0, description="Updates in which the learning rate rises.")
    updates: int | None = Field(None, ge=1, description="At which the learning rate has fallen to 0.")
    weight_decay: float = Field(0.0, ge=0, description="Above 0: AdamW.")
    max_grad_norm: float = Field(1.0, gt=0, description="Larger gradients are scaled down to it.")
    minibatch: int = Field(128, ge=1, description="Turns per optimizer step; rows with merge_turns.")
    microbatch: int | None = Field(None, ge=1, description="Rows evaluated at a time; bounds memory.")
    device: str = Field("cpu", description='Or "cuda", "cuda:1", …')
    dtype: Literal["float32", "bfloat16"] = Field("float32", description="Of the forward pass.")
    lora_rank: int = Field(0, ge=0, description="0: all weights are trained. Needs peft.")
    lora_alpha: int = Field(32, ge=1, description="Adapters count alpha / rank times.")
    seed: int = Field(0, description="Of the order of rows, and of new adapters.")

    @model_validator(mode="before")
    @classmethod
    def _preset(cls, given: Any) -> Any:
        defaults = cls.presets.get(str(given.get("preset")), {}) if isinstance(given, dict) else {}
        return {name: value for name, value in defaults.items() if name in cls.model_fields} | given

    def learner_arguments(self) -> dict[str, Any]:
        loop = {*LoopOptions.model_fields, "data"}
        given = self.model_dump(exclude={*loop, "type", "preset", "lora_rank", "lora_alpha"})
        if self.lora_rank:
            from millstream.pipeline.models.lora import LoraOptions

            given["lora"] = LoraOptions(rank=self.lora_rank, alpha=self.lora_alpha)
        return given | self.choices


class TokenOptions(LearnerOptions):
    """Of learners that weight the tokens of conversations."""

    merge_turns: bool = Field(False, description="Merge turns that continue each other into one row.")
    kl: float = Field(0.0, ge=0, description="Weight of the distance to `reference`. 0: none is loaded.")
    divergence: Literal["k2", "k3"] = Field("k3", description="Estimate of that distance; see `losses.divergence`.")
    reference: Path | None = Field(None, description="Default: `model`.")


class Recorded(BaseModel):
    """Of `recorded.source.recorded`."""

    model_config = ConfigDict(extra="forbid")

    store: str | None = Field(None, description="DSN of the store. Default: clickhouse_dsn of the settings.")
    topic: str | None = Field(None, description="In place of the store: a topic of triplets, such as a replay's.")
    experiment: str | None = Field(None, description="Its id, or the name of its run: then the newest. Default: any.")
    mode: Literal["train", "val", "test"] | None = Field("train", description="Of the rollouts.")
    sql: str | None = Field(None, description="A query for ids of rollouts, in place of experiment and mode.")

    @model_validator(mode="after")
    def _one_source(self) -> "Recorded":
        if self.topic is not None and (self.store is not None or self.sql is not None):
            raise ValueError("topic: it is read in place of the store; drop store and sql")
        return self


class RecordedGroups(Recorded):
    passes: int = Field(
        1, ge=1, description="Of policy gradients: over all groups; `epochs` are those over a step's rows."
    )


class TorchOptions(LoopOptions, TokenOptions):
    """Of policy gradients."""

    varied: ClassVar[bool] = False  # leaves out groups whose members earned the same

    epochs: int = Field(2, ge=1, description="Passes over a step's rows.")
    clip: Clip = Field((0.2, 0.28), description="Distances from ratio 1, down and up; DAPO's (arXiv:2503.14476).")
    entropy: float = Field(0.1, ge=0, description="Bonus. Random weights settle on one answer without it.")
    correction: Literal["bypass", "decoupled"] = Field(
        "bypass", description="decoupled (AReaL, arXiv:2505.24298) needs fewer steps with old data, and one more pass."
    )
    data: RecordedGroups | None = Field(
        None, description="Recorded rollouts to learn from: see `[algorithm.data]`. Default: new ones are asked for."
    )

    @model_validator(mode="after")
    def _own_groups(self) -> "TorchOptions":
        if self.data is not None and self.rubric is not None:
            raise ValueError("rubric: recorded groups keep their rewards; drop rubric, or data")
        return self

    @model_validator(mode="after")
    def _corrected(self) -> "TorchOptions":
        """What other policies have sampled is weighted by its recorded log-probabilities."""
        if self.data is not None and "correction" not in self.model_fields_set:
            self.correction = "decoupled"
        return self


class Grpo(TorchOptions):
    """Advantages within a group, turn by turn (arXiv:2402.03300; see `estimators.grpo`)."""

    type: Literal["grpo"] = "grpo"


class Dapo(TorchOptions):
    """GRPO with dynamic sampling and a punishment of answers that are too long (arXiv:2503.14476)."""

    varied = True

    type: Literal["dapo"] = "dapo"
    overlong_limit: int | None = Field(None, ge=1, description="The max_tokens of agents. None: no punishment.")
    overlong_cache: int = Field(4096, ge=1, description="The last ones of these, over which the punishment grows.")

    def learner_arguments(self) -> dict[str, Any]:
        from millstream.pipeline.algorithms.rows import Overlong

        given = super().learner_arguments()
        limit, cache = given.pop("overlong_limit"), given.pop("overlong_cache")
        return given | {"overlong": None if limit is None else Overlong(limit, cache)}


class DrGrpo(TorchOptions):
    """GRPO without its two divisions (arXiv:2503.20783): neither by the deviation nor by the answer's length."""

    choices = {"estimator": "dr_grpo", "aggregation": "sequence-mean-token-sum-norm"}

    type: Literal["dr_grpo"] = "dr_grpo"
    norm_tokens: int = Field(ge=1, description="What sums over an answer's tokens are divided by: its max_tokens.")


class Rloo(TorchOptions):
    """Each member against the mean of the others (arXiv:2402.14740)."""

    choices = {"estimator": "rloo"}

    type: Literal["rloo"] = "rloo"


class ReinforcePP(TorchOptions):
    """Advantages over the whole batch (arXiv:2501.03262)."""

    choices = {"estimator": "reinforce_pp"}

    type: Literal["reinforce_pp"] = "reinforce_pp"
    divergence: Literal["k2", "k3"] = Field("k2", description="The paper's.")


class Gspo(TorchOptions):
    """Ratios of whole answers (arXiv:2507.18071), which are far closer to 1 than a token's: so are the bounds."""

    choices = {"estimator": "grpo_group", "loss": "gspo", "aggregation": "sequence-mean-token-mean"}

    type: Literal["gspo"] = "gspo"
    clip: Clip = Field((3e-4, 4e-4), description="The paper's.")


class Cispo(TorchOptions):
    """Clips the weight of a token, not its gradient (MiniMax-M1, arXiv:2506.13585)."""

    choices = {"loss": "cispo"}

    type: Literal["cispo"] = "cispo"
    clip: Clip = Field((1.0, 0.28), description="No lower bound.")


class Ppo(TorchOptions):
    """Advantages of each token by a critic (arXiv:1707.06347; GAE, arXiv:1506.02438)."""

    choices = {"estimator": "plain"}

    type: Literal["ppo"] = "ppo"
    clip: Clip = Field((0.2, 0.2), description="The paper's.")
    critic_lr: float = Field(5e-4, ge=0, description="Learning rate of the critic.")

    def learner_arguments(self) -> dict[str, Any]:
        from millstream.pipeline.algorithms.critic import CriticOptions

        given = super().learner_arguments()
        return given | {"critic": CriticOptions(lr=given.pop("critic_lr"))}


class ImitationOptions(TokenOptions):
    """Of `recorded.imitation.ImitationLearner`, which learns from chosen answers."""

    min_reward: float | None = Field(None, description="Answers that earned at least this.")
    best_of_group: int = Field(
        1, ge=0, description="Of each group so many rollouts, those that earned the most; 0: all."
    )

    def learner_arguments(self) -> dict[str, Any]:
        from millstream.pipeline.training.datasets import Choice

        given = super().learner_arguments()
        return given | {"choice": Choice(given.pop("min_reward"), given.pop("best_of_group"))}


class Rft(LoopOptions, ImitationOptions):
    """Rejection sampling: the best answers to each task are imitated (arXiv:2304.06767, arXiv:2308.01825)."""

    type: Literal["rft"] = "rft"
    epochs: int = Field(2, ge=1, description="Passes over a step's rows.")


class RecordedOptions(SteadyOptions, LearnerOptions):
    """Of `recorded.supervised.Supervised`."""

    data: Recorded = Field(
        default_factory=lambda: Recorded.model_validate({}), description="Which rollouts: see `[algorithm.data]`."
    )
    epochs: int = Field(3, ge=1, description="Passes over all rows.")
    rows_per_step: int = Field(512, ge=1, description="Turns between two reports; rows with merge_turns.")

    def learner_arguments(self) -> dict[str, Any]:
        given = super().learner_arguments()
        del given["rows_per_step"]
        return given | {"epochs": 1}


class Sft(RecordedOptions, ImitationOptions):
    """Fine-tuning on recorded rollouts, whose chosen answers are imitated. The learning rate of the preset `pretrained`
    is 1e-5, which full fine-tuning commonly takes."""

    presets = {"pretrained": {"lr": 1e-5, "warmup": 20, "weight_decay": 0.1}}

    type: Literal["sft"] = "sft"


class Dpo(RecordedOptions):
    """Learns from recorded rollouts which of two answers to a prompt is better. The learning rate of the preset
    `pretrained` is DPO's own (arXiv:2305.18290, appendix B)."""

    presets = {"pretrained": {"lr": 1e-6, "warmup": 150}}

    type: Literal["dpo"] = "dpo"
    loss: Literal["dpo", "ipo", "kto"] = Field(
        "dpo", description="DPO (arXiv:2305.18290), IPO (arXiv:2310.12036) or KTO (arXiv:2402.01306)."
    )
    beta: float = Field(0.1, gt=0, description="How firmly the policy is held to the reference.")
    reference: Literal["frozen", "recorded"] = Field(
        "frozen", description="`model`, in memory a second time; or the log-probabilities that were recorded."
    )
    pairs: Literal["best", "all"] = Field(
        "best", description="Of the answers of a group to a prompt: the best and the worst, or every two."
    )
    margin: float = Field(0.0, ge=0, description="Rewards of a pair differ by more.")
    rows_per_step: int = Field(512, ge=2, description="Answers between two reports, two a pair.")
    minibatch: int = Field(128, ge=2, multiple_of=2, description="Answers per optimizer step, two a pair.")

    def learner_arguments(self) -> dict[str, Any]:
        from millstream.pipeline.training.datasets import PairChoice

        given = super().learner_arguments()
        choice = PairChoice(given.pop("margin"), every=given.pop("pairs") == "all")
        return given | {"choice": choice, "pair_loss": given.pop("loss")}


class VerlTable(VerlOptions):
    """Training by a verl job, over Kafka."""

    type: Literal["verl"] = "verl"


Torch = Grpo | Dapo | DrGrpo | Rloo | ReinforcePP | Gspo | Cispo | Ppo
Supervision = Sft | Dpo
Table = Torch | Rft | Supervision | VerlTable | PromptTable
PROMPTS: Final = (ApoTable, GepaTable)  # types without weights
Options = Annotated[Table, Field(discriminator="type")]


def type_of(options: type[BaseModel]) -> str:
    """The name by which a training file asks for these options."""
    return str(options.model_fields["type"].default)


def algorithm_of(options: Table, settings: Settings | None = None) -> "Algorithm":
    """``settings`` say where the store is; by default those of this process. Raises `ConfigError` without the `train`
    extra (unless it searches for prompts), and for a model that can't be loaded; with recorded rollouts also what
    `recorded.source.recorded` raises."""
    if isinstance(options, PROMPTS):
        return prompt_algorithm(options)
    try:
        from millstream.pipeline.algorithms import estimators
        from millstream.pipeline.algorithms.policy_gradient import PolicyGradient
        from millstream.pipeline.algorithms.recorded.imitation import ImitationLearner
        from millstream.pipeline.algorithms.recorded.offline import Offline
        from millstream.pipeline.algorithms.recorded.preference import PreferenceLearner
        from millstream.pipeline.algorithms.recorded.source import recorded
        from millstream.pipeline.algorithms.recorded.supervised import Supervised
        from millstream.pipeline.algorithms.rows import varied
        from millstream.pipeline.algorithms.torch_learner import TorchLearner
        from millstream.pipeline.algorithms.verl.algorithm import Verl
        from millstream.pipeline.tracing.rubric import Rubric
    except ImportError as error:
        raise ConfigError(f"training needs torch: install millstream[train] ({error})") from error
    if isinstance(options, VerlTable):
        return Verl(**options.model_dump(exclude={"type"}))
    settings = settings or load_settings()
    given = options.learner_arguments()
    if isinstance(options, Supervision):
        loop = options.model_dump(include={*SteadyOptions.model_fields, "epochs", "rows_per_step"})
        rollouts = recorded(settings, **options.data.model_dump())
        kind = ImitationLearner if isinstance(options, Sft) else PreferenceLearner
        return Supervised(kind(blobs=Blobs(settings.blob_url), **given), rollouts, **loop)
    loop = options.model_dump(include=set(LoopOptions.model_fields))
    if options.rubric is not None:
        loop["rubric"] = Rubric(model=options.rubric.judge, prompt=options.rubric.prompt)
    if isinstance(options, Rft):
        return PolicyGradient(ImitationLearner(**given), **loop)
    if "estimator" in given:
        given["estimator"] = getattr(estimators, given["estimator"])
    learner = TorchLearner(**given)
    if options.data is not None:
        steady = options.model_dump(include={*SteadyOptions.model_fields, "groups_per_step"})
        rollouts = recorded(settings, **options.data.model_dump(exclude={"passes"}))
        return Offline(learner, rollouts, epochs=options.data.passes, **steady)
    return PolicyGradient(learner, keep=varied if options.varied else None, **loop)
