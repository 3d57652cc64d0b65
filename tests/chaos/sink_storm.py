"""Kills sinks, and the store's server under them, while spans flow; then compares the views with the log.

python tests/chaos/sink_storm.py --kills 50 --spans 200000 --seed 1 --run-dir runs/storm
"""

import argparse
import asyncio
import json
import os
import random
import subprocess
import sys
import threading
import time
import uuid
import zlib
from collections import defaultdict
from contextlib import suppress
from pathlib import Path
from typing import Any

import clickhouse_connect
from checker import read, schemas
from clickhouse_connect.driver.exceptions import ClickHouseError
from rich.console import Console

from millstream.consumers.log.kafka_log import KafkaLog
from millstream.deploy.kafka.local import LocalKafka
from millstream.pipeline.addresses import free_port
from millstream.producers.log.port import Producer
from millstream.schemas.config.settings import load_settings
from millstream.schemas.folders import emptied_folder
from millstream.schemas.ids import new_id
from millstream.schemas.wire.records import Span

ROOT = Path(__file__).parents[2]
SINKS = 2
SETTLE_S = 120.0
console = Console()

Sums = dict[int, tuple[int, int, int]]  # by partition: spans, sum of their checksums, sum of their offsets

# The same checksum in SQL and in Python.
IN_THE_VIEW = """
SELECT Partition, count(), sum(CRC32(concat(RolloutId, AttemptId, TraceId, SpanId, SpanName, toString(Sequence),
    toString(Duration), SpanAttributes['note']))), sum(Offset)
FROM spans GROUP BY Partition
"""


def in_the_log(bootstrap: str, topic: str) -> Sums:
    """With nothing of Millstream's: a Kafka client and fastavro."""
    sums: dict[int, list[int]] = defaultdict(lambda: [0, 0, 0])
    for name, span, partition, offset in read(bootstrap, topic, schemas(ROOT / "schemas" / "avro")):
        assert name == "Span"
        text = "".join(span[field] for field in ("rollout_id", "attempt_id", "trace_id", "span_id", "name"))
        text += f"{span['sequence']}{span['end'] - span['start']}{span['attributes']['note']}"
        for at, value in enumerate((1, zlib.crc32(text.encode()), offset)):
            sums[partition][at] += value
    return {partition: (n, checksum, offsets) for partition, (n, checksum, offsets) in sums.items()}


def in_the_view(port: int) -> Sums:
    client = clickhouse_connect.get_client(host="127.0.0.1", port=port, database="millstream", compress=False)
    return {
        partition: (n, checksum, offsets) for partition, n, checksum, offsets in client.query(IN_THE_VIEW).result_rows
    }


def publish(producer: Producer, topic: str, count: int, stop: threading.Event, seconds: float) -> None:
    """Spreads the spans over so many seconds."""
    began = time.monotonic()
    for number in range(count):
        if number % 20 == 0:
            rollout_id, attempt_id = new_id(), new_id()
            if stop.wait(max(0.0, began + seconds * number / count - time.monotonic())):
                return
        now = time.time_ns()
        span = Span(
            trace_id=uuid.uuid4().hex,
            span_id=uuid.uuid4().hex[:16],
            name="work",
            kind="custom",
            start=now,
            end=now + number,
            attributes={"note": f"{number} " * 50},
            resource={},
            rollout_id=rollout_id,
            attempt_id=attempt_id,
            source="agent",
            sequence=number % 20,
        )
        producer.send(topic, span, key=rollout_id, headers={"kind": b"custom"})
    producer.flush(60)


class Storm:
    """One run. So many kills of sinks; the server is killed as often as any one of them, besides."""

    def __init__(self, folder: Path, seed: int) -> None:
        emptied_folder(folder, "--run-dir", "the sink's storm")
        (folder / "log").mkdir()
        self.folder, self.rng = folder, random.Random(seed)
        self.port = free_port()
        self.broker = LocalKafka(folder / "kafka", port=0)
        self.broker.up()
        bootstrap = self.broker.bootstrap_servers
        self.settings = load_settings(kafka_bootstrap_servers=bootstrap)
        self.environment = os.environ | {
            "MILLSTREAM_KAFKA_BOOTSTRAP_SERVERS": bootstrap,
            "MILLSTREAM_CLICKHOUSE_DSN": f"clickhouse://127.0.0.1:{self.port}?compress=0",
        }
        self.processes: dict[str, subprocess.Popen[bytes]] = {}

    def start(self, name: str) -> None:
        if name == "server":
            arguments = ["tests/support/clickhouse_http.py", str(self.folder / "store"), str(self.port)]
        else:
            arguments = ["-m", "millstream.pipeline", "sink", "--flush-ms", "200", "--flush-rows", "2000"]
        with (self.folder / "log" / f"{name}.log").open("ab") as log:
            self.processes[name] = subprocess.Popen(
                [sys.executable, *arguments],
                env=self.environment,
                cwd=ROOT,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def revive(self) -> None:
        for name, process in list(self.processes.items()):
            if process.poll() is not None:
                self.start(name)

    def view_when(self, expected: Sums) -> Sums | None:
        """What the view holds once that is expected, or after `SETTLE_S`; None if it can't be read."""
        found, deadline = None, time.monotonic() + SETTLE_S
        while found != expected and time.monotonic() < deadline:
            time.sleep(1.0)
            self.revive()
            with suppress(ClickHouseError):  # the server is starting, or no sink has created the tables yet
                found = in_the_view(self.port)
        return found

    def run(self, kills: int, spans: int) -> dict[str, Any]:
        log, topic = KafkaLog(self.settings), self.settings.topics.events
        asyncio.run(log.create_topics())
        names = ["server", *(f"sink-{n}" for n in range(SINKS))]
        for name in names:
            self.start(name)
        self.view_when({})  # else kills only meet starts
        producer, stop = log.producer(), threading.Event()
        feeding = threading.Thread(target=publish, args=(producer, topic, spans, stop, kills * 2.0))
        feeding.start()
        done, began = dict.fromkeys(names, 0), time.monotonic()
        try:
            while (left := kills + done["server"] - sum(done.values())) or feeding.is_alive():
                time.sleep(self.rng.uniform(0.5, 2.5))
                self.revive()
                if left:
                    name = self.rng.choice(names)
                    self.processes[name].kill()
                    self.processes[name].wait()
                    done[name] += 1
            producer.close()
            console.print(f"{time.monotonic() - began:.1f} s: everything is in the log")
            expected = in_the_log(self.broker.bootstrap_servers, topic)
            found = self.view_when(expected)
        finally:
            stop.set()
            feeding.join()
            for process in self.processes.values():
                process.terminate()
            for process in self.processes.values():
                process.wait(60)
            self.broker.down()
        return {
            "seconds": round(time.monotonic() - began, 1),
            "kills": done,
            "spans": sum(count for count, _, _ in expected.values()),
            "equal": found == expected,
            "wrong": {
                at: (expected[at], (found or {}).get(at)) for at in expected if expected[at] != (found or {}).get(at)
            },
        }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--spans", type=int, default=200_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--run-dir", type=Path, default=Path("runs/storm"))
    options = parser.parse_args()
    summary = Storm(options.run_dir.absolute(), options.seed).run(options.kills, options.spans)
    console.print_json(json.dumps(summary))
    sys.exit(not summary["equal"])
