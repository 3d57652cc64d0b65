"""Which calls are trained on, and with what reward: the ``[triplets]`` table of the settings."""

import re
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

FunctionPath = Annotated[str, Field(pattern=r"^[\w.]+:[\w.]+$", description="module:attribute of a function.")]
Range = tuple[float, float]


class TripletRules(BaseModel):
    """Each field is a decision between spans and triplets; docs/triplets.md shows their order."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    # Selection: other calls are neither trained on nor rewarded.
    agent_match: str = Field(default="", description="Regular expression of an agent's whole name; empty: any.")
    exclude_models: tuple[str, ...] = Field(default=(), description="Model names as globs: reward models, judges.")
    exclude_calls: tuple[str, ...] = Field(default=(), description="Names of LLM spans, as globs.")

    # Validation: calls that fail are kept with the reason, but not trained on.
    require_tokens: bool = Field(default=True, description="False for algorithms that learn from text.")
    trust_agents: bool = Field(
        default=False, description="Train on token ids in agents' own spans, for models called without the proxy."
    )
    max_tokens: int | None = Field(default=None, ge=1, description="Of prompt and response together.")
    max_repeats: int | None = Field(default=None, ge=1, description="How often a response may occur in an attempt.")
    rules: tuple[FunctionPath, ...] = Field(
        default=(), description="Your own: from a `Call` to a reason against it, or None."
    )

    # Rewards
    match: tuple[Literal["nearest", "agent", "span", "final", "link"] | FunctionPath, ...] = Field(
        default=("nearest",), min_length=1, description="Tried in turn for each reward, until one finds its call."
    )
    reward_range: Range | None = Field(default=None, description="Calls with rewards beyond it are not trained on.")
    weights: dict[str, float] = Field(default={}, description="By reward name; if any is given, others don't count.")
    aggregate: Literal["sum", "last", "mean"] = Field(default="sum", description="Of several rewards of one call.")
    scale: float = Field(default=1.0, description="Factor of each call's reward.")
    clip: Range | None = Field(default=None, description="Bounds of each call's reward, after scaling.")
    credit: Literal["none", "final", "discounted"] = Field(
        default="none", description="What earlier calls get of later ones."
    )
    discount: float = Field(default=1.0, ge=0, le=1, description="Per call, with credit = discounted.")

    @model_validator(mode="after")
    def _check(self) -> Self:
        for name in ("reward_range", "clip"):
            bounds: Range | None = getattr(self, name)
            if bounds is not None and bounds[0] > bounds[1]:
                raise ValueError(f"{name}: {bounds[0]:g} is above {bounds[1]:g}")
        try:
            re.compile(self.agent_match)
        except re.error as error:
            raise ValueError(f"agent_match is not a regular expression: {error}") from error
        if self.discount != 1.0 and self.credit != "discounted":
            raise ValueError("discount needs credit = discounted")
        return self
