"""Clients of model SDKs that belong to the rollout they are made in."""

from typing import TYPE_CHECKING, Any

from millstream.producers.attempt_context import current_attempt

if TYPE_CHECKING:
    import anthropic
    import openai


def openai_client(**options: Any) -> "openai.OpenAI":
    """An OpenAI client whose calls go to the proxy as those of the current attempt, whichever thread makes them.

    ``options`` are ``openai.OpenAI``'s. Where there is no proxy, or no rollout yet, it is an ordinary client: made when
    the agent's module is imported, it serves each rollout whose code uses it.
    """
    import openai

    return openai.OpenAI(**_openai_options() | options)


def async_openai_client(**options: Any) -> "openai.AsyncOpenAI":
    """`openai_client` for ``async`` code."""
    import openai

    return openai.AsyncOpenAI(**_openai_options() | options)


def anthropic_client(**options: Any) -> "anthropic.Anthropic":
    """`openai_client` for Anthropic's SDK."""
    import anthropic

    return anthropic.Anthropic(**_anthropic_options() | options)


def async_anthropic_client(**options: Any) -> "anthropic.AsyncAnthropic":
    """`anthropic_client` for ``async`` code."""
    import anthropic

    return anthropic.AsyncAnthropic(**_anthropic_options() | options)


def _openai_options() -> dict[str, str]:
    if (bound := _bound()) is None:
        return {}
    url, key = bound
    return {"base_url": f"{url}/v1", "api_key": key}


def _anthropic_options() -> dict[str, str]:
    if (bound := _bound()) is None:
        return {}
    url, key = bound
    return {"base_url": url, "auth_token": key}


def _bound() -> tuple[str, str] | None:
    """Where the current attempt's calls go, and its key there."""
    attempt = current_attempt()
    if attempt is None or not attempt.proxy_url:
        return None
    return attempt.proxy_url.rstrip("/") + attempt.path, attempt.proxy_key
