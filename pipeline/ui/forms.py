"""Forms that a page sends."""

from typing import Final
from urllib.parse import parse_qsl

from starlette.exceptions import HTTPException
from starlette.requests import Request

from millstream.pipeline.services.serve_asgi import body_of

MAX_BYTES: Final = 64 << 10
BODY_S: Final = 10.0  # for it to arrive


async def form_of(request: Request) -> dict[str, str]:
    """Its fields. Raises `HTTPException` for a form that is too large or does not arrive."""
    too_large = HTTPException(413, f"a form has at most {MAX_BYTES:,} bytes")
    body = await body_of(request, MAX_BYTES, BODY_S, too_large, HTTPException(408, "the form did not arrive"))
    return dict(parse_qsl(body.decode("utf-8", "replace"), keep_blank_values=True, max_num_fields=50))
