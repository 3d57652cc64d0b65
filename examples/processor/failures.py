"""Counts failed attempts by error type. Run it with ``python -m examples.processor.failures``; several processes share
the work."""

import asyncio
from collections import Counter
from typing import Any

from faststream import FastStream

import millstream as ms

settings = ms.load_settings()
broker = ms.broker(settings)
failures: Counter[str] = Counter()


@broker.subscriber(settings.topics.events, group_id=f"{settings.topic_prefix}.failures")
async def count(record: Any) -> None:
    if getattr(record, "status", "") == "failed" and record.error is not None:  # an AttemptEvent
        failures[record.error.type] += 1
        print(dict(failures), flush=True)


if __name__ == "__main__":
    asyncio.run(FastStream(broker).run())
