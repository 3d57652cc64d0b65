"""Numbers that can be trained on. A record can hold others: an agent writes what it likes. Pure."""

import math
import sys
from array import array
from typing import Final

TOKEN_BYTES: Final = 4
LARGEST_REWARD: Final = 3.4e38  # of float32, in which advantages are computed
# Above 0 by rounding only: servers compute in bfloat16.
LARGEST_LOGPROB: Final = 0.01
# Of a little-endian float32 the last byte is sign and exponent. With these it is finite, and below 2^-7: nothing is
# left to check.
_PLAIN: Final = bytes([*range(0x3C), *range(0x80, 0xFF)])


def bad_reward(reward: float) -> bool:
    """Not finite, or beyond float32."""
    return not abs(reward) <= LARGEST_REWARD


def bad_tokens(prompt: bytes | None, response: bytes | None, logprobs: bytes | None) -> str | None:
    """Why these token ids (int32) and log-probabilities (float32, of the response's tokens) can't be trained on, or
    None. All are little-endian; None where a call has none."""
    for name, ids in (("prompt", prompt), ("response", response)):
        if ids and len(ids) % TOKEN_BYTES:
            return f"the {name}'s token ids end within a number"
        if ids and not ids[3::4].isascii():  # the bytes with the signs
            return f"a token id of the {name} is below 0"
    if not logprobs:
        return None
    if len(logprobs) % TOKEN_BYTES:
        return "the logprobs end within a number"
    if not logprobs[3::4].translate(None, _PLAIN):
        return None
    values = array("f", logprobs)
    if sys.byteorder == "big":
        values.byteswap()
    if not math.isfinite(sum(values)):
        return "a logprob is not finite"
    return f"a logprob is {max(values):g}, above 0" if max(values) > LARGEST_LOGPROB else None
