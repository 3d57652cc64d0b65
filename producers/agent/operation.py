"""Records a part of an agent's own code as a span with input, output, duration and error."""

import inspect
from collections.abc import AsyncGenerator, Callable, Generator, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import wraps
from types import TracebackType
from typing import Any, TypeVar, cast, overload

from opentelemetry import trace
from opentelemetry.trace import Status, StatusCode
from pydantic_core import to_json

from millstream.producers.agent.emit import attempt_or_warning, checked
from millstream.schemas.spans import semconv
from millstream.schemas.spans.text import safe_repr

F = TypeVar("F", bound=Callable[..., Any])


class Operation:
    """A span around the body of a ``with``, or around each call of the function it decorates. See `operation`."""

    def __init__(self, name: str | None, attributes: Mapping[str, Any] | None) -> None:
        self._name = name or ""
        self._attributes = attributes
        self._span: trace.Span | None = None  # also None outside a rollout
        self._stack = ExitStack()

    def set_input(self, **inputs: Any) -> None:
        """Records the inputs by name."""
        self._set(semconv.AGL_OPERATION_INPUT, inputs)

    def set_output(self, output: Any) -> None:
        """Records the result."""
        self._set(semconv.AGL_OPERATION_OUTPUT, output)

    def __call__(self, function: F) -> F:
        return _traced(function, self._name or function.__qualname__, self._attributes)

    def __enter__(self) -> "Operation":
        if not self._name:
            raise TypeError("an operation used as a context manager needs a name: with operation('look up'):")
        self._stack.enter_context(self._recorded())
        self._stack.enter_context(self._current())
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._stack.__exit__(kind, error, tb)

    @contextmanager
    def _recorded(self) -> Iterator[None]:
        """Opens the span for the body, without making it current."""
        given = checked(self._name, {semconv.AGL_OPERATION_NAME: self._name, **(self._attributes or {})})
        attempt = attempt_or_warning(f"operation {self._name!r}")
        if attempt is None:
            yield
            return
        self._span = span = attempt.tracer.start_span(self._name, attributes=given)
        try:
            yield
        except Exception as error:
            span.record_exception(error)
            span.set_attribute(semconv.ERROR_TYPE, type(error).__name__)
            span.set_status(Status(StatusCode.ERROR, f"{type(error).__name__}: {error}"))
            raise
        finally:
            span.end()

    def _current(self) -> AbstractContextManager[object]:
        """Makes the span current for the body."""
        if self._span is None:
            return nullcontext()
        return trace.use_span(self._span, record_exception=False, set_status_on_exception=False)

    def _bind(self, signature: inspect.Signature, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        try:
            inputs = signature.bind(*args, **kwargs).arguments
        except TypeError:  # the following call raises a clearer error
            return
        self._set(semconv.AGL_OPERATION_INPUT, {name: v for name, v in inputs.items() if name not in ("self", "cls")})

    def _set(self, key: str, value: Any) -> None:
        """Falls back to ``repr`` for what JSON can't hold. Raises `EmitError` only if the value is too large."""
        if self._span is None:
            return
        if not isinstance(value, str):
            try:
                value = to_json(value, bytes_mode="base64", inf_nan_mode="strings", serialize_unknown=True).decode()
            except (ValueError, RecursionError):  # such as a lone surrogate in a model's output
                value = safe_repr(value)
        self._span.set_attributes(checked(self._name, {key: value}))


@overload
def operation(what: F, /) -> F: ...
@overload
def operation(what: str | None = None, /, attributes: Mapping[str, Any] | None = None) -> Operation: ...
def operation(what: Any = None, /, attributes: Mapping[str, Any] | None = None) -> Any:
    """Records a part of the agent as a span, the parent of all spans within it.

    ``@operation``, or ``@operation("name", {…})`` with attributes, decorates a sync or async function or generator. It
    records the arguments and the result (all items of a generator). A context manager records what it is given::

        with ms.operation("look up", {"source": "wiki"}) as op:
            op.set_input(city=city)
            op.set_output(found := search(city))

    An exception marks the span as failed and propagates. Raises `EmitError` if attributes, inputs or output are too
    large. Outside a rollout it only warns, once per process.
    """
    return Operation(what, attributes) if what is None or isinstance(what, str) else Operation(None, None)(what)


def _traced(function: F, name: str, attributes: Mapping[str, Any] | None) -> F:
    signature = inspect.signature(function)

    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        with Operation(name, attributes) as op:
            op._bind(signature, args, kwargs)
            result = function(*args, **kwargs)
            op.set_output(result)
            return result

    @wraps(function)
    async def call_async(*args: Any, **kwargs: Any) -> Any:
        with Operation(name, attributes) as op:
            op._bind(signature, args, kwargs)
            result = await function(*args, **kwargs)
            op.set_output(result)
            return result

    # A generator's span is current while the generator runs, but not while its caller handles an item.
    @wraps(function)
    def generate(*args: Any, **kwargs: Any) -> Generator[Any, Any, Any]:
        op, items = Operation(name, attributes), list[Any]()
        with op._recorded():
            op._bind(signature, args, kwargs)
            inner = function(*args, **kwargs)
            step, given = inner.send, None
            try:
                while True:
                    with op._current():
                        item = step(given)
                    items.append(item)
                    try:
                        step, given = inner.send, (yield item)
                    except BaseException as error:  # thrown in by the caller, or GeneratorExit
                        step, given = inner.throw, error
            except StopIteration as end:
                return end.value
            finally:
                op.set_output(items)

    @wraps(function)
    async def generate_async(*args: Any, **kwargs: Any) -> AsyncGenerator[Any, Any]:
        op, items = Operation(name, attributes), list[Any]()
        with op._recorded():
            op._bind(signature, args, kwargs)
            inner = function(*args, **kwargs)
            step, given = inner.asend, None
            try:
                while True:
                    with op._current():
                        item = await step(given)
                    items.append(item)
                    try:
                        step, given = inner.asend, (yield item)
                    except BaseException as error:
                        step, given = inner.athrow, error
            except StopAsyncIteration:
                return
            finally:
                op.set_output(items)

    kinds = (
        (inspect.isasyncgenfunction, generate_async),
        (inspect.isgeneratorfunction, generate),
        (inspect.iscoroutinefunction, call_async),
    )
    return cast("F", next((traced for is_kind, traced in kinds if is_kind(function)), call))
