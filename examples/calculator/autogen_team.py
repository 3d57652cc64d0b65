"""The calculator in AutoGen: a team of two. Each chooses the tool of one step and calls it."""

from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from typing import Any

from autogen_agentchat.agents import AssistantAgent
from autogen_agentchat.base import Response
from autogen_agentchat.conditions import MaxMessageTermination
from autogen_agentchat.messages import BaseAgentEvent, BaseChatMessage, TextMessage
from autogen_agentchat.teams import RoundRobinGroupChat
from autogen_core import CancellationToken
from autogen_core.tools import FunctionTool
from autogen_ext.models.openai import OpenAIChatCompletionClient

from examples.calculator.reward import score
from examples.calculator.tools import TOOLS

NAMES = ("first", "second")
model = OpenAIChatCompletionClient(
    model="calculator",
    max_tokens=1,
    model_info={
        "vision": False,
        "function_calling": False,
        "json_output": False,
        "structured_output": False,
        "family": "unknown",
    },
)
tools = {name: FunctionTool(function, function.__doc__ or "") for name, function in TOOLS.items()}


@dataclass
class Sheet:
    """What the team works on."""

    task: dict[str, Any]
    rollout: Any
    result: int


class Calculator(AssistantAgent):
    """Asks the model for the tool of its step, calls it, and gives the team the result."""

    def __init__(self, step: int, sheet: Sheet) -> None:
        super().__init__(NAMES[step], model, system_message=f"choose a {NAMES[step]} tool")
        self._step = step
        self._sheet = sheet

    async def on_messages_stream(
        self, messages: Sequence[BaseChatMessage], cancellation_token: CancellationToken
    ) -> AsyncGenerator[BaseAgentEvent | BaseChatMessage | Response, None]:
        async for item in super().on_messages_stream(messages, cancellation_token):
            if isinstance(item, Response):
                item.chat_message = await self._call(item.chat_message.to_text(), cancellation_token)
            yield item

    async def _call(self, word: str, cancellation_token: CancellationToken) -> TextMessage:
        """Calls the tool that the model has named; a word that is none does nothing."""
        task, sheet = self._sheet.task, self._sheet
        if word in tools:
            arguments = {"a": sheet.result, "b": task["numbers"][self._step + 1]}
            sheet.result = await tools[word].run_json(arguments, cancellation_token)
        score(self._step, word == task["tools"][self._step], sheet.rollout)
        following = task["question"].split(" then ")[self._step + 1 :][:1]
        content = " . ".join([f"{word} result {sheet.result}", *(f"then {part} ?" for part in following)])
        return TextMessage(content=content, source=self.name)


async def agent(task: dict[str, Any], rollout: Any = None) -> int:
    """Works a question out, step by step; returns the number it arrives at."""
    sheet = Sheet(task, rollout, task["numbers"][0])
    everybody = [Calculator(step, sheet) for step in range(len(NAMES))]
    team = RoundRobinGroupChat(everybody, termination_condition=MaxMessageTermination(1 + len(NAMES)))  # type: ignore[arg-type] # invariant
    first, *_ = task["question"].split(" then ")
    await team.run(task=f"{first} ?")
    return sheet.result
