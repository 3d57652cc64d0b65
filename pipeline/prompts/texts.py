"""What critics and editors are asked, and what their answers hold. Pure."""

import re
from collections.abc import Sequence
from typing import Any, Final

from millstream.pipeline.training.groups import FinishedRollout
from millstream.schemas.control import PromptTemplate
from millstream.schemas.wire import status
from millstream.schemas.wire.trainable import bad_reward

SHOWN: Final = 4000  # characters of a conversation; the beginning and the end of longer ones are shown
CRITIC: Final = (
    "You review prompts for AI agents. You see a prompt template, and what an agent did with it: tasks, conversations "
    "and rewards (higher is better). Say what in the template causes the low rewards, and what it should say instead. "
    "Be specific and short. Don't write the template yourself."
)
EDITOR: Final = (
    "You edit prompt templates for AI agents. Rewrite the template so that it answers the review. Keep each "
    "placeholder exactly as it is written, and add none. Reply with the whole new template between <prompt> and "
    "</prompt>."
)
PROMPT: Final = re.compile(r"<prompt>\n?(.*?)\n?</prompt>", re.DOTALL)

Messages = list[dict[str, str]]


def score(finished: FinishedRollout) -> float:
    """What a rollout has earned. A failed one, and one without a usable reward, counts as 0: a prompt that breaks the
    agent must not look better than one that does not."""
    reward = finished.end.reward
    if finished.end.status != status.SUCCEEDED or reward is None or bad_reward(reward):
        return 0.0
    return reward


def experience(task: str, finished: FinishedRollout) -> str:
    """A rollout, for a critic to read."""
    end = finished.end
    parts = [f"Task: {shortened(task)}"]
    if finished.triplets:
        last = finished.triplets[-1]
        parts += [f"Conversation: {shortened(last.prompt)}", f"Last answer: {shortened(last.response)}"]
    if end.status != status.SUCCEEDED:
        parts.append(f"The agent ended as {end.status}{f': {shortened(end.reason)}' if end.reason else ''}.")
    parts.append(f"Reward: {score(finished):g}")
    return "\n".join(parts)


def critique_of(name: str, template: PromptTemplate, experiences: Sequence[str]) -> Messages:
    rollouts = "\n\n".join(f"Rollout {number}\n{text}" for number, text in enumerate(experiences, 1))
    return _asked(CRITIC, f"Template {name!r}:\n<prompt>\n{template.template}\n</prompt>\n\n{rollouts}")


def edit_of(name: str, template: PromptTemplate, critique: str) -> Messages:
    kept = ", ".join(sorted(template.placeholders())) or "none"
    return _asked(
        EDITOR,
        f"Template {name!r}:\n<prompt>\n{template.template}\n</prompt>\n\nPlaceholders: {kept}\n\nReview:\n{critique}",
    )


def edited(answer: str) -> str | None:
    """The template in an editor's answer: the last one, if it shows the old one, too. None without one."""
    found = PROMPT.findall(answer)
    return found[-1] if found else None


def reviewed(answer: str) -> str:
    """What a reflection says beside the new template, which stands between its first and its last fence."""
    before, fence, rest = answer.partition("```")
    return f"{before.strip()}\n\n{rest.rpartition('```')[2].strip()}".strip() if fence else ""


def shortened(text: str) -> str:
    if len(text) <= SHOWN:
        return text
    half = SHOWN // 2
    return f"{text[:half]} … ({len(text) - SHOWN:,} characters left out) … {text[-half:]}"


def answer_text(body: Any) -> str | None:
    """The text of a chat completion; None if it has none."""
    try:
        content = body["choices"][0]["message"]["content"]
    except (LookupError, TypeError):
        return None
    return content if isinstance(content, str) and content.strip() else None


def _asked(system: str, user: str) -> Messages:
    return [{"role": "system", "content": system}, {"role": "user", "content": user}]
