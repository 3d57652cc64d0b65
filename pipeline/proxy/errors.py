"""What a client gets instead of an answer. Pure."""

import orjson

from millstream.pipeline.protocols.answers import error_text
from millstream.pipeline.protocols.endpoints import Plan
from millstream.pipeline.protocols.json_text import loads_object


class CallError(Exception):
    """The client gets this status and message, in the form of its protocol."""

    def __init__(self, status: int, message: str, headers: dict[str, str] | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.headers = headers or {}


def refusal(plan: Plan, status: int, body: bytes, message: str, key: str) -> tuple[str, bytes]:
    """The message and the body of an error for the client, from what a server answered. The body goes through as it is
    if the client speaks the server's protocol. ``message`` is used if the server gives none; ``key``, the server's,
    is in neither."""
    data = loads_object(body)
    if data is not None and (error := data.get("error") or data.get("message") or data.get("detail")):
        message = error_text(error)
    message = _without(key, message)
    if data is not None and plan.served_by is plan.endpoint and isinstance(data.get("error"), dict):
        return message, _without(key, body.decode("utf-8", "replace")).encode()
    return message, orjson.dumps(plan.endpoint.error_body(message, status))


def _without(key: str, text: str) -> str:
    return text.replace(key, "…") if key else text
