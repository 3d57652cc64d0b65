"""Runs a role as ``python -m millstream.pipeline`` does, with faults that only its own process can have.

A fault is a file below ``CHAOS_FAULTS``, named after the process: ``NAME.clock`` holds the seconds that are added to
the wall clock; ``NAME.stop`` stops the process once, between a poll for tasks and their claim; while ``NAME.commit``
exists, no offset commit is answered. With the text "late" the brokers have got it all the same.
"""

import asyncio
import mmap
import os
import signal
import struct
import sys
import time
from pathlib import Path

FAULTS, NAME = Path(os.environ["CHAOS_FAULTS"]), sys.argv.pop(1)


def fault(kind: str) -> Path:
    return FAULTS / f"{NAME}.{kind}"


def shift_clock() -> None:
    """Before anything else is imported. The monotonic clock stays."""
    with fault("clock").open("r+b") as file:
        offset = mmap.mmap(file.fileno(), 8)
    seconds, nanoseconds = time.time, time.time_ns

    def shift() -> float:
        return float(struct.unpack_from("<d", offset)[0])

    time.time = lambda: seconds() + shift()
    time.time_ns = lambda: nanoseconds() + int(shift() * 1e9)


def break_consumer() -> None:
    """Where aiokafka and the role meet."""
    from aiokafka import AIOKafkaConsumer

    getmany, commit = AIOKafkaConsumer.getmany, AIOKafkaConsumer.commit

    async def stopped_getmany(self, *partitions, **options):
        got = await getmany(self, *partitions, **options)
        if fault("stop").exists() and any(".tasks." in partition.topic for partition in got):
            fault("stop").unlink()
            os.kill(os.getpid(), signal.SIGSTOP)
        return got

    async def unanswered_commit(self, *arguments):
        if fault("commit").exists():
            if fault("commit").read_text() == "late":
                await commit(self, *arguments)
            await asyncio.Event().wait()
        await commit(self, *arguments)

    AIOKafkaConsumer.getmany, AIOKafkaConsumer.commit = stopped_getmany, unanswered_commit


shift_clock()
break_consumer()

from millstream.pipeline.cli.main import main  # noqa: E402 - with the clock of this process

main()
