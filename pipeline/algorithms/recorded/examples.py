"""What learners of recorded answers share: the token ids of an answer, recorded or by the chat template."""

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from millstream.pipeline.algorithms.rows import Row, unusable
from millstream.pipeline.algorithms.torch_learner import TorchLearner
from millstream.pipeline.models.policy import load_tokenizer
from millstream.pipeline.training.datasets import Rollout, conversation, for_template, tools_of, with_contents
from millstream.pipeline.training.groups import Group, trainable_turns
from millstream.producers.blob_store import Blobs
from millstream.schemas.errors import CodecError
from millstream.schemas.wire.records import Triplet


class ExampleLearner(TorchLearner, ABC):
    """A `TorchLearner` of examples: rows that it makes of rollouts. As a `Learner` it makes them of each step's groups.

    ``blobs`` holds long texts of turns that have no token ids; the model's chat template gives those.
    """

    def __init__(self, model: str | Path, *, blobs: Blobs | None = None, entropy: float = 0.0, **learner: Any) -> None:
        super().__init__(model, entropy=entropy, **learner)
        self._blobs = blobs

    @abstractmethod
    def rows(self, rollouts: Sequence[Rollout]) -> tuple[list[Row], Counter[str]]:
        """Of the chosen answers, with the reward of each; and how many of them can't be learnt from, by reason."""

    @cached_property
    def _tokenizer(self) -> Any:
        return load_tokenizer(self.model)

    def update(self, groups: Sequence[Group]) -> dict[str, float]:
        """See `Learner.update`. ``chosen_rollouts``: how many of the rollouts are learnt from."""
        rows, refused = self.rows([m.triplets for group in groups for m in group.members if trainable_turns(m)])
        counts = {
            "dropped_groups": sum(not any(map(trainable_turns, group.members)) for group in groups),
            "dropped_turns": refused.total(),
            "chosen_rollouts": len({row.rollout_id for row in rows}),
            "rows": len(rows),
        }
        return {name: float(count) for name, count in counts.items()} | self.learn(rows)

    def usable(self, triplet: Triplet) -> Triplet:
        """The triplet with token ids. Raises `CodecError` if it can't be learnt from."""
        triplet = self._with_tokens(triplet)
        if (reason := unusable(triplet, self.vocabulary)) is not None:
            raise CodecError(reason)
        return triplet

    def _with_tokens(self, triplet: Triplet) -> Triplet:
        """With the token ids that were recorded, else those of the chat template. Log-probabilities are not needed: 0
        where there are none."""
        if not (triplet.prompt_token_ids and triplet.response_token_ids):
            triplet = self._templated(triplet)
        if triplet.response_logprobs:
            return triplet
        return replace(triplet, response_logprobs=bytes(len(triplet.response_token_ids or b"")))

    def _templated(self, triplet: Triplet) -> Triplet:
        """The answer is what the template adds to the prompt, up to the token that ends it. Raises `CodecError`."""
        if self._blobs is not None:
            triplet = with_contents(triplet, self._blobs)
        asked = list(map(for_template, conversation(triplet, "prompt")))
        answer = list(map(for_template, conversation(triplet, "response")))
        render, tools = self._tokenizer.apply_chat_template, tools_of(triplet).get("tools")
        prompt = render(asked, tools=tools, add_generation_prompt=True, return_dict=False)
        whole = render([*asked, *answer], tools=tools, return_dict=False)
        if whole[: len(prompt)] != prompt:
            raise CodecError("the chat template renders the prompt in another way once it is answered")
        response = whole[len(prompt) :]
        if (end := self._tokenizer.eos_token_id) in response:
            response = response[: len(response) - response[::-1].index(end)]
        return replace(
            triplet,
            prompt_token_ids=np.asarray(prompt, "<i4").tobytes(),
            response_token_ids=np.asarray(response, "<i4").tobytes(),
            response_logprobs=None,
        )
