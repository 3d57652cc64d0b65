"""Renders the templates: everything that they show is escaped, cut and made visible."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote, urlencode

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from starlette.requests import Request
from starlette.responses import HTMLResponse

from millstream.pipeline.ui import text

HERE: Final = Path(__file__).parent
STATIC: Final = HERE / "static"

_environment = Environment(
    loader=FileSystemLoader(HERE / "templates"),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
_environment.filters |= {
    "shown": text.shown,
    "line": text.line,
    "number": text.number,
    "seconds": text.seconds,
    "moment": text.moment,
    "short": text.short_id,
    "token": text.token,
    "path": lambda value: quote(str(value), safe=""),
    "query": lambda values: urlencode({k: v for k, v in values.items() if v not in (None, "")}),
    "percent": lambda value: "–" if value is None or value != value else f"{value:.0%}",
}


def page(request: Request, name: str, values: Mapping[str, Any], status: int = 200) -> HTMLResponse:
    """The template ``name``; it knows the request's ``base``, below which all addresses are."""
    source = request.app.state.source
    html = _environment.get_template(name).render(
        base=request.scope.get("root_path", ""),
        here=request.scope["path"].removeprefix(request.scope.get("root_path", "")),
        has_log=source.has_log,
        token=bool(request.app.state.token),
        **values,
    )
    return HTMLResponse(html, status)


def is_part(request: Request) -> bool:
    """Whether htmx asks for a part of a page, to put it into the page that is shown."""
    return "hx-request" in request.headers


def number_of(request: Request, name: str, default: int, least: int = 0, most: int = 1_000_000) -> int:
    """A number of the address; one that is not a number counts as the default."""
    try:
        return min(max(int(request.query_params.get(name, "")), least), most)
    except ValueError:
        return default
