"""Learning to answer as chosen answers do: the learner of fine-tuning, on recorded rollouts or on a step's own."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, Final

import numpy as np

from millstream.pipeline.algorithms.rows import Row, merged, row_of, unusable
from millstream.pipeline.algorithms.torch_learner import TorchLearner
from millstream.pipeline.models.policy import load_tokenizer
from millstream.pipeline.training.datasets import Choice, Rollout, chosen, conversation, tools_of, with_contents
from millstream.pipeline.training.groups import Group, trainable_turns
from millstream.producers.blob_store import Blobs
from millstream.schemas.errors import CodecError
from millstream.schemas.spans.text import parsed
from millstream.schemas.wire.prefixes import conversations
from millstream.schemas.wire.records import Triplet

BEST: Final = Choice(best_of_group=1)


class ImitationLearner(TorchLearner):
    """A `TorchLearner` of the cross-entropy of chosen answers; prompts, tools' results and earlier answers are read and
    not learnt.

    `learn` takes `rows`. As a `Learner` it imitates the chosen answers of each step's groups: rejection sampling
    fine-tuning (RAFT: Dong et al., arXiv:2304.06767; RFT: Yuan et al., arXiv:2308.01825). ``blobs`` holds long texts of
    turns that have no token ids; the model's chat template gives those.
    """

    def __init__(
        self,
        model: str | Path,
        *,
        choice: Choice = BEST,
        blobs: Blobs | None = None,
        entropy: float = 0.0,
        **learner: Any,
    ) -> None:
        super().__init__(model, entropy=entropy, **learner)
        self.arguments |= {"choice": choice}
        self._choice, self._blobs = choice, blobs

    @cached_property
    def _tokenizer(self) -> Any:
        return load_tokenizer(self.model)

    def update(self, groups: Sequence[Group]) -> dict[str, float]:
        """See `Learner.update`. ``chosen_rollouts``: how many of the rollouts are imitated."""
        rows, refused = self.rows([m.triplets for group in groups for m in group.members if trainable_turns(m)])
        counts = {
            "dropped_groups": sum(not any(map(trainable_turns, group.members)) for group in groups),
            "dropped_turns": refused.total(),
            "chosen_rollouts": len({row.rollout_id for row in rows}),
            "rows": len(rows),
        }
        return {name: float(count) for name, count in counts.items()} | self.learn(rows)

    def rows(self, rollouts: Sequence[Rollout]) -> tuple[list[Row], Counter[str]]:
        """Of the chosen answers, with the reward of each; and how many of them can't be learnt from, by reason."""
        turns: dict[str, list[tuple[Triplet, float]]] = {}
        refused: Counter[str] = Counter()
        for triplet, reward in chosen(rollouts, self._choice):
            try:
                triplet = self._with_tokens(triplet)
                if (reason := unusable(triplet, self.vocabulary)) is not None:
                    raise CodecError(reason)
            except CodecError as error:
                refused[str(error)] += 1
                continue
            turns.setdefault(triplet.rollout_id, []).append((triplet, reward))
        rows = []
        for of_rollout in turns.values():
            earned = {triplet.turn: reward for triplet, reward in of_rollout}
            triplets = [triplet for triplet, _ in of_rollout]
            for part in conversations(triplets) if self.merge_turns else [[triplet] for triplet in triplets]:
                row = merged([row_of(triplet, dict.fromkeys(earned, 0.0), earned) for triplet in part])
                rows.append(replace(row, rl=[0.0] * len(row.rl), ce=row.rl))
        return rows, refused

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
        asked = list(map(_for_template, conversation(triplet, "prompt")))
        answer = list(map(_for_template, conversation(triplet, "response")))
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


def _for_template(message: dict[str, Any]) -> dict[str, Any]:
    """Chat templates take the arguments of tool calls as objects."""
    calls = [
        call | {"function": call["function"] | {"arguments": _object(call["function"]["arguments"])}}
        for call in message.get("tool_calls") or ()
    ]
    return message | ({"tool_calls": calls} if calls else {})


def _object(arguments: str) -> Any:
    try:
        return parsed(arguments)
    except ValueError:
        return arguments
