"""Answers that are given again: for how long, and how many."""

from millstream.pipeline.proxy.cache import AnswerCache, cache_key


def test_an_answer_is_given_again_until_it_expires():
    now = 0.0
    cache = AnswerCache(60.0, 100, clock=lambda: now)
    cache.put(b"a", b"1")
    now = 59.0
    assert cache.get(b"a") == b"1"
    assert cache.get(b"b") is None
    cache.put(b"a", b"2")
    now = 61.0
    assert cache.get(b"a") == b"2"
    now = 120.0
    assert cache.get(b"a") is None


def test_it_holds_so_many_bytes_and_drops_the_oldest():
    cache = AnswerCache(60.0, 10)
    cache.put(b"a", b"x" * 4)
    cache.put(b"b", b"x" * 4)
    cache.put(b"a", b"y" * 4)  # newer than b now
    cache.put(b"c", b"x" * 4)
    assert [cache.get(key) for key in (b"a", b"b", b"c")] == [b"y" * 4, None, b"x" * 4]
    assert cache.size == 8
    cache.put(b"d", b"x" * 11)
    assert cache.size == 0


def test_keys_tell_requests_upstreams_and_paths_apart():
    asked = [("a", "/p", b"x"), ("b", "/p", b"x"), ("a", "/q", b"x"), ("a", "/p", b"y")]
    assert len({cache_key(*each) for each in asked}) == len(asked)
