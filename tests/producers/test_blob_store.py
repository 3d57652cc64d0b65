"""Long contents by reference: what a span says, what the store holds, and how they come together again."""

import json
import uuid
from pathlib import Path

import pytest
from factories import span, task
from hypothesis import given
from hypothesis import strategies as st

from millstream.producers.blob_store import BlobError, Blobs
from millstream.schemas.errors import ConfigError
from millstream.schemas.spans import blobs as references
from millstream.schemas.wire.records import SpanEvent

IMAGE = "data:image/png;base64," + "iVBORw0KGgo" * 100_000
LONG = "é" * references.LIMIT


def said(image, text):
    content = [{"type": "image_url", "image_url": {"url": image}}, {"type": "text", "text": text}]
    return json.dumps([{"role": "user", "content": content}], ensure_ascii=False)


def with_attributes(**attributes):
    return span(task(), "a", attributes=attributes)


def files(folder):
    return [path for path in Path(folder).rglob("*") if path.is_file()]


@pytest.fixture(params=["folder", "memory"])
def store(request, tmp_path):
    if request.param == "folder":
        return Blobs(str(tmp_path))
    pytest.importorskip("fsspec")
    return Blobs(f"memory://{uuid.uuid4()}")


async def test_long_attributes_are_kept_and_come_back(store):
    event = SpanEvent(name="exception", time=0, attributes={"stack": LONG})
    whole = span(task(), "a", attributes={"text": LONG, "messages": said(IMAGE, "hi"), "short": "x"}, events=(event,))
    kept = await store.keep(whole)
    assert kept.attributes["short"] == "x"
    assert kept.attributes["text"] == kept.events[0].attributes["stack"]
    assert f"({2 * references.LIMIT} bytes)" in kept.attributes["text"]
    (message,) = json.loads(kept.attributes["messages"])  # messages stay messages
    assert message["content"][1]["text"] == "hi"
    assert references.is_reference(message["content"][0]["image_url"]["url"])
    assert {name: store.whole(value) for name, value in kept.attributes.items()} == whole.attributes


async def test_one_image_in_many_turns_is_one_content(tmp_path):
    store = Blobs(str(tmp_path))
    for turn in range(3):
        await store.keep(with_attributes(messages=said(IMAGE, f"turn {turn}")))
    assert len(files(tmp_path)) == 1


async def test_messages_that_are_too_long_without_their_long_parts_go_as_a_whole(store):
    text = json.dumps(["x" * 1000] * 400 + [IMAGE])
    kept = await store.keep(with_attributes(text=text))
    assert references.is_reference(kept.attributes["text"])
    assert json.loads(store.whole(kept.attributes["text"])) == json.loads(text)


async def test_what_is_short_is_the_same_span():
    short = with_attributes(text="x" * references.LIMIT)
    assert await Blobs("nowhere").keep(short) is short


async def test_what_is_there_is_not_written_again(tmp_path):
    await Blobs(str(tmp_path)).keep(with_attributes(text=LONG))
    (file,) = files(tmp_path)
    file.chmod(0o444)
    before = file.stat()
    await Blobs(str(tmp_path)).keep(with_attributes(text=LONG))
    assert (file.stat().st_mtime_ns, file.stat().st_ino) == (before.st_mtime_ns, before.st_ino)
    assert len(files(tmp_path)) == 1


async def test_what_a_killed_process_left_half_written_is_not_taken_for_the_content(tmp_path):
    digest = references.digest_of(LONG.encode())
    part = tmp_path / digest[:2] / f"{digest}.0000.part"
    part.parent.mkdir()
    part.write_bytes(b"half")
    store = Blobs(str(tmp_path))
    with pytest.raises(BlobError, match=f"sha256:{digest} was not found in {tmp_path}"):
        store.get(digest)
    store.put(digest, LONG.encode()).result()
    assert store.get(digest) == LONG.encode()


async def test_a_store_that_is_down_is_an_error_that_names_it_and_it_is_tried_again(tmp_path):
    (tmp_path / "store").write_text("a file where the folder should be")
    store = Blobs(str(tmp_path / "store"))
    with pytest.raises(BlobError, match=rf"sha256:[0-9a-f]{{64}} \(524288 bytes\) was not stored in {tmp_path}/store"):
        await store.keep(with_attributes(text=LONG))
    (tmp_path / "store").unlink()
    kept = await store.keep(with_attributes(text=LONG))
    assert store.whole(kept.attributes["text"]) == LONG


def test_a_content_under_a_wrong_name_is_refused(tmp_path):
    store = Blobs(str(tmp_path))
    with pytest.raises(BlobError, match="does not match its name"):
        store.put("0" * 64, b"x").result()
    assert files(tmp_path) == []


def test_a_content_that_was_changed_is_refused(tmp_path):
    store = Blobs(str(tmp_path))
    digest = references.digest_of(b"x")
    store.put(digest, b"x").result()
    files(tmp_path)[0].write_bytes(b"y")
    with pytest.raises(BlobError, match="has been changed"):
        store.get(digest)


def test_an_unknown_file_system_is_an_error_that_names_the_setting():
    pytest.importorskip("fsspec")
    with pytest.raises(ConfigError, match="blob_url nonsense://x can't be used"):
        Blobs("nonsense://x")


long = st.builds(
    str.__mul__, st.sampled_from(["a", "é", "😀"]), st.sampled_from([1, references.PART, references.LIMIT])
)
values = st.recursive(
    st.one_of(st.none(), st.integers(), long),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.sampled_from("ab"), inner)),
    max_leaves=4,
)


@given(st.one_of(long, st.builds(lambda value: json.dumps(value, ensure_ascii=False), values)))
def test_every_attribute_is_within_the_limit_and_comes_back(text):
    kept, contents = references.kept_apart(with_attributes(text=text))
    assert len(kept.attributes["text"].encode()) <= references.LIMIT
    assert references.whole(kept.attributes["text"], contents.__getitem__) == text
