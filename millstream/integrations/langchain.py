"""LangChain: a model whose calls go through Millstream's proxy."""

from functools import cache
from types import new_class
from typing import Any, TypeVar

from langchain_core.language_models import BaseLanguageModel

from millstream.producers.agent.client_binding import bind_clients
from millstream.producers.agent.process_tracer import PLACEHOLDER_KEY
from millstream.schemas.errors import ConfigError

M = TypeVar("M", bound=BaseLanguageModel[Any])

_ENDPOINT, _KEY = "openai_api_base", "openai_api_key"
_CLIENTS = {"client", "async_client", "root_client", "root_async_client"}  # created again, for the other endpoint


def LLMWrapper(llm: M, *, proxy_endpoint: str) -> M:  # noqa: N802 - it makes what it is named for
    """The same model, whose calls go through the proxy at ``proxy_endpoint`` (http://host:8400) as calls of the rollout
    whose code makes them. It has the type of ``llm`` and its uses (chains, ``bind_tools``, agents), and can be called:
    ``wrapped("Hello")`` is ``wrapped.invoke("Hello")``. One wrapper serves every rollout. Outside of a rollout, a call
    raises `OutsideRollout`.

    Raises `ConfigError` unless ``llm`` speaks OpenAI's API through ``langchain_openai`` (``ChatOpenAI``, ``OpenAI`` and
    what is derived from them), or if ``proxy_endpoint`` is not a URL.
    """
    kind = type(llm)
    if _ENDPOINT not in kind.model_fields:
        raise ConfigError(
            f"LLMWrapper can't send {kind.__name__} through the proxy: it takes the models of langchain_openai, before "
            "bind_tools and the like"
        )
    endpoint = proxy_endpoint.rstrip("/").removesuffix("/v1")
    bind_clients(endpoint)
    given = {name: getattr(llm, name) for name in llm.model_fields_set - _CLIENTS}
    return _callable(kind)(**given | {_ENDPOINT: f"{endpoint}/v1", _KEY: PLACEHOLDER_KEY})  # type: ignore[no-any-return]


@cache
def _callable(kind: type[Any]) -> type[Any]:
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        """As ``invoke``."""
        return self.invoke(*args, **kwargs)

    # Named as what it stands for: that name goes into traces.
    body = {"__call__": call, "__module__": kind.__module__, "__doc__": kind.__doc__}
    return new_class(kind.__name__, (kind,), exec_body=lambda namespace: namespace.update(body))
