"""The LLM calls of a trace, each once, and the spans around them. Time is the position in the log, never a clock."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from millstream.schemas.spans import semconv
from millstream.schemas.wire.records import Span


@dataclass(frozen=True, slots=True)
class Call:
    """One LLM call. ``turn``: its number among all calls of the attempt. ``ended``: the position in the trace after
    which a reward may be for it. ``agent``: the name of the agent that made it, if the trace has it."""

    turn: int
    span: Span
    ended: int
    agent: str | None

    @property
    def response_id(self) -> str:
        return self.span.attributes.get(semconv.RESPONSE_ID, "")

    @property
    def model(self) -> str:
        attributes = self.span.attributes
        return attributes.get(semconv.RESPONSE_MODEL) or attributes.get(semconv.REQUEST_MODEL, "")

    def text(self, *names: str) -> str:
        """The first of these attributes that the span has, else an empty JSON list."""
        attributes = self.span.attributes
        for name in names:
            if name in attributes:
                return attributes[name]
        return "[]"

    @property
    def prompt(self) -> str:
        return self.text(semconv.REQUEST_MESSAGES, semconv.INPUT_MESSAGES)

    @property
    def response(self) -> str:
        return self.text(semconv.RESPONSE_MESSAGE, semconv.OUTPUT_MESSAGES)


class SpanTree:
    """Which spans enclose which."""

    def __init__(self, spans: Sequence[Span]) -> None:
        self._by_id = {span.span_id: span for span in spans}
        self._agents: dict[str, str | None] = {}  # span id → name

    def enclosing(self, span: Span) -> Iterator[str]:
        """Ids of the spans around it, innermost first, including ids that the trace lacks. Stops at a cycle."""
        seen = {span.span_id}
        parent = span.parent_id
        while parent and parent not in seen:
            yield parent
            seen.add(parent)
            outer = self._by_id.get(parent)
            parent = outer.parent_id if outer is not None else ""

    def agent(self, span: Span) -> str | None:
        """The name of its agent: its own attribute, else that of the innermost enclosing span."""
        name = span.attributes.get(semconv.AGENT_NAME)
        if name is not None or not span.parent_id:
            return name
        way = []
        for outer in self.enclosing(span):
            if outer in self._agents:
                name = self._agents[outer]
                break
            way.append(outer)
            found = self._by_id.get(outer)
            name = None if found is None else found.attributes.get(semconv.AGENT_NAME)
            if name is not None:
                break
        self._agents.update(dict.fromkeys(way, name))  # so no path is walked twice
        return name


def calls_of(spans: Sequence[Span], tree: SpanTree) -> list[Call]:
    """Each LLM call once, in log order.

    The spans of one call (SDK, framework, proxy) share its response id; one without an id that encloses another LLM
    span is a wrapper of that call. The proxy's span counts, with its token ids; without one, the first. A call ends at
    the agent's own span of it, if there is one: that span and the rewards come from one process, in one order. Else it
    ends at the proxy's span, which is in the log before the agent gets the answer.
    """
    found = [
        (position, span, span.attributes.get(semconv.RESPONSE_ID, ""))
        for position, span in enumerate(spans)
        if span.kind == semconv.LLM
    ]
    wrappers: set[str] = set()
    if any(not key and span.source != semconv.SOURCE_PROXY for _, span, key in found):
        wrappers.update(outer for _, span, _ in found for outer in tree.enclosing(span))
    counted: dict[str, tuple[int, Span]] = {}
    by_agent: dict[str, tuple[int, Span]] = {}
    for position, span, key in found:
        if not key:  # the call failed, or the framework does not record it
            if span.span_id in wrappers:
                continue
            key = span.span_id
        if span.source != semconv.SOURCE_PROXY:
            by_agent.setdefault(key, (position, span))
        if key not in counted or span.source == semconv.SOURCE_PROXY != counted[key][1].source:
            counted[key] = (position, span)
    calls = []
    for turn, (key, (position, span)) in enumerate(sorted(counted.items(), key=lambda one: one[1][0])):
        ended, own = by_agent.get(key, (position, span))
        calls.append(Call(turn, span, ended, tree.agent(span) or tree.agent(own)))
    return calls
