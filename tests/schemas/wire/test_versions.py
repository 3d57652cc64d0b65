"""Which version made which tokens, as text and back."""

from io import BytesIO

import pytest
from fastavro import schemaless_reader, schemaless_writer

from millstream.schemas.wire.codec import load_schema
from millstream.schemas.wire.versions import Versions, from_text, joined, to_text


@pytest.mark.parametrize(
    "versions", [((0, "r.0.1"),), ((0, "r.0.1"), (2, "r.0.2")), ((0, "a/ü.0.1"), (1, "b"), (2, "a/ü.0.1"))]
)
def test_text_and_back(versions: Versions) -> None:
    assert to_text(versions).isascii()
    assert from_text(to_text(versions), 3) == versions


@pytest.mark.parametrize(
    "text",
    [
        "", "mixed", "{}", "[]", "3", "null", "[[0]]", "[0]", '["ab"]', '[[0, "a", "b"]]', '[["0", "a"]]', "[[0, 1]]",
        '[[0.0, "a"]]', '[[false, "a"]]', "[" * 100_000,
        '[[1, "a"]]', '[[0, "a"], [0, "b"]]', '[[0, "a"], [2, "b"], [1, "c"]]', '[[0, "a"], [3, "b"]]', '[[-1, "a"]]',
    ],
)  # fmt: skip
def test_what_does_not_give_each_token_one_version_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="versions of tokens must"):
        from_text(text, 3)


def test_notes_are_joined() -> None:
    assert joined([]) == ()
    assert joined([(0, "a"), (0, "b"), (4, "b"), (4, "c"), (9, "b"), (9, "c"), (9, "a")]) == (
        (0, "b"),
        (4, "c"),
        (9, "a"),
    )


def test_a_triplet_of_another_version_of_millstream_is_read_with_avros_rules() -> None:
    """A reader without the field skips it; a reader with it takes null for what an older writer left out."""
    now = load_schema("Triplet")
    earlier = now | {"fields": [field for field in now["fields"] if field["name"] != "response_versions"]}
    values = {field["name"]: field.get("default") for field in now["fields"]}
    values |= {field["name"]: "x" for field in now["fields"] if field["type"] == "string"} | {"turn": 0}
    said = values | {"response_versions": '[[0,"r.0.1"],[1,"r.0.2"]]'}
    for writer, reader, expected in (
        (earlier, now, values),
        (now, earlier, {name: value for name, value in said.items() if name != "response_versions"}),
        (now, now, said),
    ):
        body = BytesIO()
        schemaless_writer(body, writer, said)
        body.seek(0)
        assert schemaless_reader(body, writer, reader) == expected
