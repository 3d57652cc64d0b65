"""Passwords in URLs are hidden."""

import pytest

from millstream.schemas.redaction import has_password, without_passwords


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("clickhouse://me:hunter2@host:8123/db", "clickhouse://me:***@host:8123/db"),
        ("can't open http://:hunter2@host: refused", "can't open http://:***@host: refused"),
        ("http://me:hun@ter:2@host/", "http://me:***@host/"),
        ("s3://KEY:hunter2@bucket/blobs", "s3://KEY:***@bucket/blobs"),
        ("'postgresql+asyncpg://me:hunter2@db'", "'postgresql+asyncpg://me:***@db'"),
        ("https://h/p?user=a&password=hunter2&x=1", "https://h/p?user=a&password=***&x=1"),
        ("https://h/?api_key=hunter2", "https://h/?api_key=***"),
        ("https://h/?Signature=hunter2#f", "https://h/?Signature=***#f"),
        ('{"a": "redis://:hunter2@h", "b": "x:y@z"}', '{"a": "redis://:***@h", "b": "x:y@z"}'),
        ("a://u:hunter2@b and c://v:hunter2@d", "a://u:***@b and c://v:***@d"),
    ],
)
def test_a_password_in_a_url_is_hidden(text: str, shown: str) -> None:
    """Section F6."""
    assert without_passwords(text) == shown
    assert has_password(text)


@pytest.mark.parametrize(
    "text",
    ["http://host:8123/a:b@c", "me@example.com:80", "http://me@host", "a: b @ c", "", "x://", "https://h/?q=token"],
)
def test_everything_else_is_left_as_it_is(text: str) -> None:
    assert without_passwords(text) == text
    assert not has_password(text)


def test_it_takes_linear_time() -> None:
    text = "://a:" * 100_000
    assert without_passwords(text) == text
