"""The spans of an attempt as rows of a tree with a waterfall. Pure."""

from collections.abc import Sequence
from dataclasses import dataclass

from millstream.pipeline.store.rollout_diff import children, error_of, token_counts
from millstream.schemas.spans import semconv
from millstream.schemas.spans.dialects import normalised
from millstream.schemas.wire.records import Span

WIDTH = 1000.0  # of the waterfall, in its own units
NARROWEST = 3.0


@dataclass(frozen=True, slots=True)
class Row:
    """A span, ``depth`` levels below the attempt; its bar begins at ``x`` of `WIDTH`."""

    span: Span
    depth: int
    x: float
    width: float
    seconds: float
    error: str
    label: str  # what it did, beside its name
    tokens: tuple[int | None, int | None]


def rows(spans: Sequence[Span], at: int, size: int) -> list[Row]:
    """``size`` rows from ``at``, of all in the order of the tree: each span, then what is below it, by start. A span in
    a circle of parents is left at the top."""
    if not spans:
        return []
    begin = min(span.start for span in spans)
    length = max(max(span.end for span in spans) - begin, 1)
    return [_row(normalised(span), depth, begin, length) for span, depth in _tree(spans)[at : at + size]]


def _tree(spans: Sequence[Span]) -> list[tuple[Span, int]]:
    """Each span with its depth."""
    below = children(spans)
    found: list[tuple[Span, int]] = []
    done: set[int] = set()

    def walk(top: Sequence[Span]) -> None:
        waiting = [(span, 0) for span in reversed(top)]
        while waiting:
            span, depth = waiting.pop()
            if id(span) in done:
                continue
            done.add(id(span))
            found.append((span, depth))
            waiting += [(child, depth + 1) for child in reversed(below.get(span.span_id, ()))]

    walk(below.get("", ()))
    walk([span for span in spans if id(span) not in done])
    return found


def _row(span: Span, depth: int, begin: int, length: int) -> Row:
    x = (span.start - begin) / length * WIDTH
    width = max((span.end - span.start) / length * WIDTH, NARROWEST)
    return Row(
        span=span,
        depth=depth,
        x=round(min(x, WIDTH - NARROWEST), 2),
        width=round(min(width, WIDTH - min(x, WIDTH - NARROWEST)), 2),
        seconds=(span.end - span.start) / 1e9,
        error=error_of(span),
        label=_label(span),
        tokens=token_counts(span),
    )


def _label(span: Span) -> str:
    if span.reward is not None:
        return f"{span.reward_name or 'reward'} {span.reward:g}"
    if span.kind == semconv.TOOL:
        return span.attributes.get(semconv.TOOL_NAME, "")
    if span.kind == semconv.LLM:
        return span.model_version or span.attributes.get("gen_ai.request.model", "")
    return ""
