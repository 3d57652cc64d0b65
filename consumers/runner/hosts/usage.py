"""What agent processes use of the machine, from Linux's /proc."""

import os
import resource
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

TICKS: Final = os.sysconf("SC_CLK_TCK")
PAGE_BYTES: Final = os.sysconf("SC_PAGE_SIZE")


@dataclass(frozen=True, slots=True)
class Usage:
    cpu_s: float  # of those that live and of those that have ended, with the processes that they have waited for
    resident_bytes: int  # of those that live


def usage_of(processes: Iterable[int]) -> Usage:
    """Of this process's children, of which ``processes`` live. The CPU time of one that ends moves from /proc to the
    kernel's account of ended children, so the sum never falls."""
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu_s, resident = ended.ru_utime + ended.ru_stime, 0
    for pid in processes:
        try:
            # proc(5): after the name, which is in parentheses, the third field follows
            fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
        except OSError:  # it has just ended
            continue
        cpu_s += sum(map(int, fields[11:15])) / TICKS  # utime, stime, cutime, cstime
        resident += int(fields[21]) * PAGE_BYTES
    return Usage(cpu_s, resident)
