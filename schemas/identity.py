"""How an LLM call is bound to its attempt: the path below the proxy and the key that fits only that path."""

import hashlib
import hmac


def attempt_path(rollout_id: str, attempt_id: str) -> str:
    """Prefix of every proxy path of an attempt; API paths such as ``/v1/chat/completions`` follow it."""
    return f"/rollout/{rollout_id}/attempt/{attempt_id}"


def attempt_key(secret: str, rollout_id: str, attempt_id: str) -> str:
    """The API key of an attempt: HMAC-SHA-256 of its path under the deployment's proxy secret, in hex."""
    return hmac.new(secret.encode(), attempt_path(rollout_id, attempt_id).encode(), hashlib.sha256).hexdigest()
