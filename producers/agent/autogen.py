"""Creates spans of AutoGen's teams and tool calls. AutoGen creates its agents' spans, and the SDK those of model calls.

AutoGen's own tool spans (0.7) hold neither arguments nor result. OpenInference's instrumentation records both, but
reports Ok for a tool that failed, and duplicates the SDK's model calls and AutoGen's agent spans.
"""

from collections.abc import AsyncIterator, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from types import ModuleType
from typing import Any, cast

import wrapt
from opentelemetry import context as otel
from opentelemetry import trace
from opentelemetry.trace import Span, Status, StatusCode, Tracer, TracerProvider, set_span_in_context

from millstream.schemas.spans import semconv
from millstream.schemas.spans.text import as_text

_OUR_TOOL_CALL = otel.create_key("millstream.autogen.tool")


class AutogenInstrumentor:
    """Has the interface of an OpenTelemetry instrumentor."""

    def instrument(self, *, tracer_provider: TracerProvider, **_options: Any) -> None:
        """Call it once per process. Raises AttributeError or ImportError for an unsupported AutoGen version."""
        tracer = tracer_provider.get_tracer("millstream.autogen")
        wrap = wrapt.wrap_function_wrapper
        wrap("autogen_agentchat.teams", "BaseGroupChat.run_stream", partial(_run_team, tracer))
        wrap("autogen_agentchat.agents", "AssistantAgent._execute_tool_call", partial(_call_tool, tracer))
        wrap("autogen_core.tools._base", "trace_tool_span", _inner_tool_span)
        wrapt.register_post_import_hook(_wrap_mcp, "autogen_ext.tools.mcp._workbench")


def _wrap_mcp(module: ModuleType) -> None:
    wrapt.wrap_function_wrapper(module, "trace_tool_span", _inner_tool_span)


async def _run_team(
    tracer: Tracer, wrapped: Any, team: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> AsyncIterator[Any]:
    """Keeps the span current while the team works, but not while the caller handles a message."""
    attributes = {semconv.OPERATION: "invoke_workflow", semconv.WORKFLOW_NAME: team.name}
    span = tracer.start_span(f"invoke_workflow {team.name}", attributes=attributes)
    inside = set_span_in_context(span)
    messages = wrapped(*args, **kwargs)
    try:
        while True:
            token = otel.attach(inside)
            try:
                message = await anext(messages)
            except StopAsyncIteration:
                return
            finally:
                otel.detach(token)
            if stop_reason := getattr(message, "stop_reason", None):
                span.set_attribute("autogen.stop_reason", stop_reason)
            yield message
    except Exception as error:
        _failed(span, error)
        raise
    finally:
        await messages.aclose()
        span.end()


async def _call_tool(tracer: Tracer, wrapped: Any, instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    call = kwargs["tool_call"]
    attributes = {
        semconv.OPERATION: "execute_tool",
        semconv.TOOL_NAME: call.name,
        semconv.TOOL_CALL_ID: call.id,
        semconv.TOOL_ARGUMENTS: call.arguments,
        semconv.AGENT_NAME: kwargs["agent_name"],
    }
    with tracer.start_as_current_span(f"execute_tool {call.name}", attributes=attributes) as span:
        token = otel.attach(otel.set_value(_OUR_TOOL_CALL, span))
        try:
            answer = await wrapped(*args, **kwargs)
        finally:
            otel.detach(token)
        result = answer[1]
        span.set_attribute(semconv.TOOL_RESULT, as_text(result.content))
        if result.is_error:
            span.set_status(Status(StatusCode.ERROR, as_text(result.content)))
    return answer


def _inner_tool_span(
    wrapped: Any, instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> AbstractContextManager[Any]:
    """Omits AutoGen's span of a tool call that already has ours."""
    ours = otel.get_value(_OUR_TOOL_CALL)
    if ours is None or ours is not trace.get_current_span():
        return cast("AbstractContextManager[Any]", wrapped(*args, **kwargs))
    return _noting_errors(ours)


@contextmanager
def _noting_errors(span: Span) -> Iterator[Span]:
    """Records a tool's exception before the agent converts it to text for the model."""
    try:
        yield span
    except Exception as error:
        _failed(span, error)
        raise


def _failed(span: Span, error: Exception) -> None:
    span.record_exception(error)
    span.set_attribute(semconv.ERROR_TYPE, type(error).__name__)
    span.set_status(Status(StatusCode.ERROR, str(error)))
