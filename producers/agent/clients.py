"""Creates clients of model SDKs that are bound to the current rollout."""

from typing import TYPE_CHECKING, Any

from millstream.producers.agent.attempt import current_attempt

if TYPE_CHECKING:
    import anthropic
    import openai


def openai_client(**options: Any) -> "openai.OpenAI":
    """An OpenAI client that calls the proxy for the current attempt, from any thread.

    ``options`` are those of ``openai.OpenAI``. Without a proxy or a current rollout it returns an ordinary client: one
    created when the agent's module is imported serves every rollout that uses it.
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
    attempt = current_attempt()
    return {"base_url": f"{base}/v1", "api_key": attempt.proxy_key} if attempt and (base := attempt.base_url) else {}


def _anthropic_options() -> dict[str, str]:
    attempt = current_attempt()
    return {"base_url": base, "auth_token": attempt.proxy_key} if attempt and (base := attempt.base_url) else {}
