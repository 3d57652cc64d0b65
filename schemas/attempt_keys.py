"""Binds LLM calls to their attempt: the path below the proxy, and the key that fits only that path."""

import hashlib
import hmac
import time
from dataclasses import dataclass
from typing import Final
from urllib.parse import quote, unquote

from millstream.schemas.errors import MillstreamError

# How long a key is valid beyond its attempt's time-out: calls may still be in flight, the attempt has to be closed, and
# clocks may differ.
KEY_GRACE_S: Final = 300.0
_MARK: Final = "ms2"
MAC_CHARS: Final = 64  # hex
TAG_CHARS: Final = 32


class BadKey(MillstreamError, ValueError):
    """The key is malformed, expired, or another attempt's. The message says which, and never shows the key."""


@dataclass(frozen=True, slots=True)
class Claims:
    """What a key says; the proxy secret signs it."""

    issued: float  # s since the epoch
    expires: float
    resources_id: str  # the version that the attempt uses; empty without one
    seed: int | None = None  # of the task, from which the proxy derives those of the attempt's model calls


def attempt_path(rollout_id: str, attempt_id: str) -> str:
    """Prefix of every proxy path of an attempt; API paths such as ``/v1/chat/completions`` follow it."""
    return f"/rollout/{rollout_id}/attempt/{attempt_id}"


def attempt_key(
    secret: str,
    rollout_id: str,
    attempt_id: str,
    *,
    valid_s: float,
    resources_id: str = "",
    seed: int | None = None,
    now: float | None = None,
) -> str:
    """The API key of an attempt: ``ms2.ISSUED.EXPIRES.SEED.RESOURCES.MAC``, where SEED may be empty, RESOURCES is
    percent-encoded and the MAC is HMAC-SHA-256 of the path and of everything before it, under the deployment's proxy
    secret, followed by one of the key so far, which `check_issued` reads. It is valid for ``valid_s`` plus
    `KEY_GRACE_S`."""
    issued = time.time() if now is None else now
    times = f"{issued:.0f}.{issued + valid_s + KEY_GRACE_S:.0f}"
    claims = f"{_MARK}.{times}.{'' if seed is None else seed}.{quote(resources_id, safe='')}"
    return f"{claims}.{_mac(secret, rollout_id, attempt_id, claims)}"


def claims_of(secret: str, rollout_id: str, attempt_id: str, key: str, *, now: float | None = None) -> Claims:
    """Raises `BadKey` unless ``key`` is one of this attempt's and still valid."""
    claims, _, mac = key.rpartition(".")
    if not hmac.compare_digest(mac.encode(), _mac(secret, rollout_id, attempt_id, claims).encode()):
        raise BadKey(f"the API key does not belong to attempt {attempt_id}")
    if not claims.startswith(f"{_MARK}."):
        raise BadKey(
            f"the API key of attempt {attempt_id} has the form of another version of Millstream: "
            "let runners and proxies have the same one"
        )
    try:
        _, issued, expires, seed, resources_id = claims.split(".", 4)  # an id may hold dots
        found = Claims(int(issued), int(expires), unquote(resources_id), int(seed) if seed else None)
    except ValueError as error:
        raise BadKey(f"the API key of attempt {attempt_id} is malformed") from error
    if found.expires < (time.time() if now is None else now):
        raise BadKey(f"the API key of attempt {attempt_id} has expired")
    return found


def check_issued(secret: str, key: str, *, now: float | None = None) -> None:
    """Raises `BadKey` unless ``key`` is one of this deployment's and still valid, whichever attempt it belongs to: for
    a receiver that knows the attempts only when it has read the request's body."""
    claims, _, mac = key.rpartition(".")
    if not hmac.compare_digest(mac[MAC_CHARS:].encode(), _tag(secret, claims, mac[:MAC_CHARS]).encode()):
        raise BadKey("the API key is not one of this deployment")
    if float(claims.split(".")[2]) < (time.time() if now is None else now):
        raise BadKey("the API key has expired")


def _mac(secret: str, rollout_id: str, attempt_id: str, claims: str) -> str:
    mac = _hmac(secret, f"{attempt_path(rollout_id, attempt_id)}\n{claims}")
    return mac + _tag(secret, claims, mac)


def _tag(secret: str, claims: str, mac: str) -> str:
    return _hmac(secret, f"issued\n{claims}.{mac}")[:TAG_CHARS]


def _hmac(secret: str, message: str) -> str:
    return hmac.new(secret.encode(), message.encode("utf-8", "surrogateescape"), hashlib.sha256).hexdigest()
