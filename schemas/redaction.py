"""Passwords stay out of what is recorded or printed: in URLs, DSNs and their parameters."""

import re
from typing import Final

# The part between the scheme and the host (RFC 3986, section 3.2.1): a password may hold any character but these.
_USERINFO: Final = re.compile(r"(?<=://)([^\s/?#:@\"'<>]*):[^\s/?#\"'<>]+@")
_PARAMETER: Final = re.compile(
    r"([?&;](?:password|passwd|pwd|token|secret|api_?key|access_?key|secret_?key|signature|sig)=)[^\s&;#\"'<>]+", re.I
)


def without_passwords(text: str) -> str:
    """The text with ``***`` in place of each password in a URL, as in ``clickhouse://user:***@host?password=***``."""
    if "://" not in text:
        return text
    return _PARAMETER.sub(r"\1***", _USERINFO.sub(r"\1:***@", text))


def has_password(url: str) -> bool:
    return without_passwords(url) != url
