"""The processes of a deployment, read from the log on request."""

from millstream.consumers.log.port import Log
from millstream.consumers.log.read_to_end import read_to_end
from millstream.schemas.errors import CodecError
from millstream.schemas.wire import codec
from millstream.schemas.wire.log import Partition
from millstream.schemas.wire.records import Worker
from millstream.schemas.wire.topics import Topics

GONE_S = 20.0  # without a report, after which a process counts as gone; it reports every five seconds


async def read_workers(log: Log, topics: Topics) -> list[Worker]:
    """The last record of each process, ended ones included, in the order of their starts."""
    found: dict[str, Worker] = {}
    async for record in read_to_end(log, [Partition(topics.workers, 0)]):
        try:
            worker = codec.decode_as(Worker, record.value)
        except CodecError:  # perhaps of a newer version
            continue
        found[worker.worker_id] = worker
    return sorted(found.values(), key=lambda worker: worker.started)


def is_alive(worker: Worker, now_ns: int) -> bool:
    return now_ns - worker.last_seen < GONE_S * 1e9
