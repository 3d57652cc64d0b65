"""Candidates as resources versions, and as records that the store keeps."""

import json
import logging
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Final

from millstream.pipeline.prompts.search import Candidate
from millstream.pipeline.training.run import Run
from millstream.producers.files import write_atomically
from millstream.schemas.control import PromptTemplate, PromptVersion
from millstream.schemas.errors import ConfigError
from millstream.schemas.spans.text import json_text

logger = logging.getLogger(__name__)

FILE: Final = "prompts.json"  # within a run's folder: the best templates


class Versions:
    """What a run has announced of its candidates."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._offered: set[str] = set()
        self._written: dict[str, PromptVersion] = {}

    async def offer(self, candidate: Candidate) -> None:
        """Rollouts may ask for it."""
        if candidate.resources_id not in self._offered:
            await self._run.offer(candidate.resources_id, candidate.templates)
            self._offered.add(candidate.resources_id)

    async def write(self, candidates: Iterable[Candidate], known: Mapping[int, Candidate]) -> None:
        """Writes the records of those that are new or have changed. ``known``: by number, for their parents' ids."""
        for each in candidates:
            record = PromptVersion(
                resources_id=each.resources_id,
                experiment_id=self._run.experiment.experiment_id,
                number=each.number,
                round=each.round,
                parent="" if each.parent is None else known[each.parent].resources_id,
                edited=each.edited,
                templates=each.templates,
                critique=each.critique,
                rollout_id=each.rollout_id,
                stage=each.stage,
                refused=each.refused,
                parent_score=each.parent_score,
                batch_score=each.batch_score,
                score=each.score,
            )
            if self._written.get(each.resources_id) != record:
                await self._run.announce(record)
                self._written[each.resources_id] = record

    async def settle(self, best: Candidate) -> None:
        """Makes these templates the run's: its current version, and the file in its folder."""
        self._run.prompts = dict(best.templates)
        current = await self._run.publish({})
        text = json_text(
            {
                "experiment_id": self._run.experiment.experiment_id,
                "resources_id": current.resources_id,
                "candidate": best.number,
                "score": best.score,
                "prompts": {name: asdict(template) for name, template in best.templates.items()},
            }
        )
        write_atomically(self._run.run_dir / FILE, f"{text}\n".encode())
        logger.info("the best prompt is candidate %d, with %s; it is in %s", best.number, best.score, FILE)


def best_prompts(run_dir: Path) -> dict[str, PromptTemplate]:
    """The templates that a run's search has ended with. Raises `ConfigError` if it has not, or the file is damaged."""
    path = run_dir / FILE
    try:
        found = json.loads(path.read_text("utf-8"))["prompts"]
        return {name: PromptTemplate(**template) for name, template in found.items()}
    except FileNotFoundError:
        raise ConfigError(f"{path} does not exist: no search for prompts has ended there") from None
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise ConfigError(f"{path} can't be read ({type(error).__name__}: {error})") from error
