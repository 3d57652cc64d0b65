"""Keeps a process's memory and environment, with its secrets, from other processes of the same user."""

import ctypes
import logging
import sys
from typing import Final

logger = logging.getLogger(__name__)

PR_SET_DUMPABLE: Final = 4  # prctl(2)


def hide_memory() -> None:
    """From now on only root may read ``/proc/PID/environ`` and ``mem`` of this process or attach a debugger to it, and
    it leaves no core file. Processes that it starts are not affected. Linux only; elsewhere it does nothing."""
    if sys.platform == "linux" and ctypes.CDLL(None, use_errno=True).prctl(PR_SET_DUMPABLE, 0, 0, 0, 0) != 0:
        logger.warning("other processes of this user can read this one's memory: prctl failed, %d", ctypes.get_errno())
