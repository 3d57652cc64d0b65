"""Options of the types of algorithm that search for prompts, for training files."""

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from millstream.pipeline.prompts.search import check_template
from millstream.schemas.control import PromptTemplate
from millstream.schemas.errors import ConfigError

if TYPE_CHECKING:
    from millstream.pipeline.training.algorithm import Algorithm


class PromptConfig(BaseModel):
    """A template that agents read as ``resources[NAME]``: its text, or the file that holds it."""

    model_config = ConfigDict(extra="forbid")

    template: str | None = Field(None, description="Its text.")
    file: Path | None = Field(None, description="File with its text, in place of `template`.")
    engine: Literal["f-string", "jinja2"] = Field("f-string", description="`{name}`, or Jinja2's `{{ name }}`.")

    @model_validator(mode="after")
    def _one_text(self) -> "PromptConfig":
        if (self.template is None) == (self.file is None):
            raise ValueError("give either template or file")
        return self

    def read(self, name: str) -> PromptTemplate:
        """Raises `ConfigError` naming the file or template."""
        text = self.template
        if self.file is not None:
            try:
                text = self.file.read_text("utf-8")
            except (OSError, UnicodeDecodeError) as error:
                raise ConfigError(f"prompts.{name}: {self.file} can't be read: {error}") from error
        template = PromptTemplate(template=text or "", engine=self.engine)
        check_template(name, template)
        return template


class SearchOptions(BaseModel):
    """Of every search over prompts: who writes them, and what that may cost."""

    model_config = ConfigDict(extra="forbid")

    budget_tokens: int | None = Field(None, ge=0, description="Of these models' calls, prompts and answers together.")
    budget_money: float | None = Field(None, ge=0, description="For these calls, in the currency of the prices.")
    prompt_price: float = Field(0.0, ge=0, description="Of a million tokens of their prompts.")
    answer_price: float = Field(0.0, ge=0, description="Of a million tokens of their answers.")
    request: dict[str, Any] = Field({}, description="Further fields of their requests, such as temperature.")


class ApoTable(SearchOptions):
    """Searches for a better prompt by textual gradients and a beam (arXiv:2305.03495); no weights change."""

    type: Literal["apo"] = "apo"
    critic: str = Field(description="Model that says what is wrong with a prompt; the proxy has a route for it.")
    editor: str = Field("", description="Model that rewrites it. Default: the critic.")
    beam_width: int = Field(4, ge=1, description="Candidates that a round begins with.")
    branch_factor: int = Field(4, ge=1, description="New ones that it makes of each.")
    rounds: int = Field(3, ge=1, description="A round is a step.")
    batch: int = Field(4, ge=1, description="Tasks of a critique, and of a candidate's first test.")
    validation_batch: int = Field(16, ge=1, description="Validation tasks, the same for all candidates.")


class GepaTable(SearchOptions):
    """Searches for a better prompt by reflective evolution with a Pareto front (arXiv:2507.19457), by the package gepa:
    the extra `prompts`. No weights change."""

    type: Literal["gepa"] = "gepa"
    critic: str = Field(description="Model that reflects and rewrites; the proxy has a route for it.")
    max_rollouts: int = Field(400, ge=1, description="At which it ends.")
    batch: int = Field(3, ge=1, description="Tasks of a reflection, and of a candidate's first test.")


PromptTable = ApoTable | GepaTable


def prompt_algorithm(options: PromptTable) -> "Algorithm":
    """Raises `ConfigError` if the package of the type is missing."""
    from millstream.pipeline.prompts.apo import Apo
    from millstream.pipeline.prompts.search import Beam
    from millstream.pipeline.prompts.writers import Budget

    budget = Budget(
        tokens=options.budget_tokens,
        money=options.budget_money,
        prompt_price=options.prompt_price,
        answer_price=options.answer_price,
    )
    if isinstance(options, GepaTable):
        from millstream.pipeline.prompts.gepa import Gepa

        return Gepa(
            critic=options.critic,
            max_rollouts=options.max_rollouts,
            batch=options.batch,
            budget=budget,
            request=options.request,
        )
    beam = Beam(**options.model_dump(include={"beam_width", "branch_factor", "rounds", "batch", "validation_batch"}))
    return Apo(critic=options.critic, editor=options.editor, beam=beam, budget=budget, request=options.request)
