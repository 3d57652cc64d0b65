"""Which log-probabilities can be trained on."""

import struct

import pytest

from millstream.schemas.wire.trainable import bad_tokens

LEAST_NEGATIVE, MOST = struct.unpack("<f", b"\x01\x00\x00\x80")[0], 3.4028234e38


@pytest.mark.parametrize(
    "value", [0.0, -0.0, LEAST_NEGATIVE, -1.5, -1e38, -1.7e38, -3e38, -MOST, 0.0078, 0.0079, 0.0099]
)
def test_what_a_server_may_report_is_usable(value: float) -> None:
    assert bad_tokens(None, None, struct.pack("<3f", -0.5, value, -0.25)) is None


@pytest.mark.parametrize(
    ("value", "why"),
    [
        (0.011, "a logprob is 0.011, above 0"),
        (1.0, "a logprob is 1, above 0"),
        (MOST, "a logprob is 3.40282e+38, above 0"),
        (float("inf"), "a logprob is not finite"),
        (float("-inf"), "a logprob is not finite"),
        (float("nan"), "a logprob is not finite"),
        (struct.unpack("<f", b"\x01\x00\x80\xff")[0], "a logprob is not finite"),
    ],
)
def test_what_would_spoil_a_batch_is_named(value: float, why: str) -> None:
    assert bad_tokens(None, None, struct.pack("<3f", -0.5, value, -0.25)) == why
