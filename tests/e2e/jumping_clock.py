"""All clocks of this process, the event loop's included, run as ever, and jump when they are told to. Import it before
whatever may keep a clock as a default value."""

import time

_monotonic, _time, _time_ns = time.monotonic, time.time, time.time_ns
_ahead_s = 0.0


def jump(seconds: float) -> None:
    global _ahead_s
    _ahead_s += seconds


time.monotonic = lambda: _monotonic() + _ahead_s
time.time = lambda: _time() + _ahead_s
time.time_ns = lambda: _time_ns() + int(_ahead_s * 1e9)
