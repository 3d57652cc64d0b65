"""Proves from the log, with nothing of Millstream's: each published rollout has ended exactly once, and so on.

Reads the topics with a plain Kafka client (read_committed), the packaged Avro schemas with fastavro, and the store with
chDB. `check` returns counts, and what is wrong by name (some of each).
"""

import json
import subprocess
import sys
import time
from collections import Counter, defaultdict
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

import fastavro
from confluent_kafka import Consumer, TopicPartition
from fastavro.schema import fingerprint, to_parsing_canonical_form

if TYPE_CHECKING:
    from harness import Chaos

OFFSETS_S = 120.0  # an adapter's committed offset is that far behind, at most: the last rollouts have ended by then


def schemas(folder):
    found = {}
    for path in Path(folder).glob("*.avsc"):
        schema = json.loads(path.read_text())
        found[bytes.fromhex(fingerprint(to_parsing_canonical_form(schema), "CRC-64-AVRO"))] = (
            schema["name"],
            fastavro.parse_schema(schema),
        )
    return found


def read(bootstrap, topic, known):
    """Every committed record of a topic, each partition in its order: (name, fields, partition, offset). Without a
    name, and with no fields, if it is no record."""
    consumer = Consumer(
        {
            "bootstrap.servers": bootstrap,
            "group.id": "checker",
            "isolation.level": "read_committed",
            "enable.partition.eof": True,
            "enable.auto.commit": False,
        }
    )
    partitions = consumer.list_topics(topic, timeout=30).topics[topic].partitions
    consumer.assign([TopicPartition(topic, p, 0) for p in partitions])
    left = set(partitions)
    while left:
        for message in consumer.consume(500, 0.5):
            if message.error() is not None:
                left.discard(message.partition())
                continue
            body = message.value() or b""
            name, schema = known.get(body[2:10] if body[:2] == b"\xc3\x01" else b"", ("", None))
            record = {}
            if name:
                try:
                    record = fastavro.schemaless_reader(BytesIO(body[10:]), schema, None)
                except (EOFError, ValueError, IndexError):
                    name = ""
            yield name, record, message.partition(), message.offset()
    consumer.close()


def held_back(bootstrap, group, topic):
    """Partitions whose committed offset lies more than `OFFSETS_S` behind."""
    consumer = Consumer({"bootstrap.servers": bootstrap, "group.id": group, "enable.auto.commit": False})
    numbers = consumer.list_topics(topic, timeout=30).topics[topic].partitions
    committed = consumer.committed([TopicPartition(topic, n) for n in numbers], timeout=30)
    since = int((time.time() - OFFSETS_S) * 1000)
    reached = consumer.offsets_for_times([TopicPartition(topic, n, since) for n in numbers], timeout=30)
    consumer.close()
    first = {at.partition: at.offset for at in reached if at.offset >= 0}
    return [f"{topic}[{at.partition}]: {at.offset}" for at in committed if at.offset < first.get(at.partition, 0)]


READ_STORE = """
import sys
from chdb.session import Session
query = "SELECT rollout_id, status FROM millstream.rollouts"
sys.stdout.buffer.write(Session(sys.argv[1]).query(query, "JSONCompactEachRow").bytes())
"""


def stored(dsn):
    """Rollout → status, of a store in a folder that no process has open; in a process of its own, which has one
    engine."""
    command = [sys.executable, "-c", READ_STORE, dsn.removeprefix("chdb://")]
    return dict(map(json.loads, subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout.splitlines()))


def check(chaos: "Chaos", schemas_folder):
    """When all roles are down."""
    settings, known = chaos.settings, schemas(schemas_folder)
    bootstrap, prefix, published = settings.kafka_bootstrap_servers, settings.topic_prefix, chaos.published
    ends, triplets = Counter(), defaultdict(Counter)
    chosen, outcome, triplet_attempts, refused = {}, {}, defaultdict(set), set()
    for name, record, *_ in read(bootstrap, f"{prefix}.triplets", known):
        if name == "RolloutEnd":
            ends[record["rollout_id"]] += 1
            chosen[record["rollout_id"]] = record["attempt_id"]
            outcome[record["rollout_id"]] = record["status"]
            if (record["reason"] or "").startswith("too_large"):  # the brokers refused its triplets
                refused.add(record["rollout_id"])
        else:
            triplets[record["rollout_id"]][record["turn"]] += 1
            triplet_attempts[record["rollout_id"]].add(record["attempt_id"])
    calls, claims, over, ignored = Counter(), defaultdict(list), {}, 0
    seen, silent, given_up, ended_in_events = {}, set(), set(), set()
    no_records = set()
    for name, record, *place in read(bootstrap, f"{prefix}.events", known):
        rollout = record.get("rollout_id")
        if not name:
            no_records.add(tuple(place))
        elif name == "Span" and record["source"] == "proxy" and record["kind"] == "llm":
            calls[record["attempt_id"]] += 1
        elif name == "RolloutEnd":
            ended_in_events.add(rollout)
        elif name == "AttemptEvent":
            attempt, status = record["attempt_id"], record["status"]
            if status == "retry":
                given_up.add(attempt)
            elif (record["time"] - seen.setdefault(attempt, record["time"])) / 1e9 > record["lease_s"]:
                silent.add(attempt)
            else:
                seen[attempt] = record["time"]
            if status == "preparing":
                claims[rollout].append(attempt)
            elif status == "retry":
                over.setdefault(attempt, "retry")
            elif status == "succeeded" and (rollout in ended_in_events or over.get(attempt) == "retry"):
                ignored += 1
            elif status not in ("running", "retry"):
                over.setdefault(attempt, status)
    starts, attempts_of, ran = Counter(), defaultdict(set), {}
    letters = Counter(
        (letter["partition"], letter["offset"])
        for name, letter, *_ in read(bootstrap, f"{prefix}.dead", known)
        if letter["topic"] == f"{prefix}.events" and letter["role"] == "adapter"
    )
    for line in chaos.ledger.read_text().splitlines():
        entry = json.loads(line)
        first, _ = ran.get(entry["attempt"], (entry["time"], 0))
        ran[entry["attempt"]] = first, entry["time"]
        if entry["event"] == "start":
            starts[entry["attempt"]] += 1
            attempts_of[entry["rollout"]].add(entry["attempt"])

    in_store = stored(settings.clickhouse_dsn)
    lost = [r for r in published if ends[r] == 0]
    duplicate_ends = [r for r, n in ends.items() if n > 1]
    duplicate_triplets = [r for r, turns in triplets.items() if any(n > 1 for n in turns.values())]
    wrong = []
    for rollout, status in outcome.items():
        if status == "succeeded" and rollout not in chaos.poisoned | refused:
            if triplet_attempts[rollout] != {chosen[rollout]}:
                wrong.append(f"{rollout}: triplets of attempts {triplet_attempts[rollout]}, chosen {chosen[rollout]}")
            elif sum(triplets[rollout].values()) != calls[chosen[rollout]]:
                wrong.append(f"{rollout}: {sum(triplets[rollout].values())} triplets, {calls[chosen[rollout]]} calls")
    twice = [attempt for attempt, n in starts.items() if n > 1]
    causeless = []
    for rollout, attempts in attempts_of.items():
        # A success that came after a silence longer than its lease was lost all the same. A claim that never ran
        # counts: its task was delivered to somebody else.
        causes = sum(
            over.get(attempt) not in (None, "succeeded") or attempt in silent & given_up
            for attempt in set(claims[rollout])
        )
        if len(attempts) > 1 + causes and rollout not in chaos.poisoned:
            causeless.append(f"{rollout}: run {len(attempts)} times, but only {causes} attempts were lost or failed")
    problems = {
        "lost": lost,
        "duplicate_ends": duplicate_ends,
        "duplicate_triplets": duplicate_triplets,
        "wrong_sets": wrong,
        "attempts_run_twice": twice,
        "run_again_without_cause": causeless,
        "ended_but_never_published": sorted(set(ends) - set(published) - chaos.foreign),
        "without_a_dead_letter": sorted(no_records - set(letters)),
        "with_two_dead_letters": [place for place, n in letters.items() if n > 1],
        "held_back": held_back(bootstrap, f"{prefix}.adapter", f"{prefix}.events"),
        "not_in_the_store": [r for r, status in outcome.items() if in_store.get(r) != status],
    }
    summary = {name: len(found) for name, found in problems.items()} | {
        "published": len(published),
        "ended": sum(1 for r in published if ends[r]),
        "poisoned": len(chaos.poisoned),
        "no_records": len(no_records),
        **Counter(outcome.values()),
        "zombie_results_ignored": ignored,
        "executions": sum(starts.values()),
        # of attempts that no rollout ended with, from the agents' first line to their last one
        "wasted_agent_seconds": round(sum(b - a for of, (a, b) in ran.items() if of not in set(chosen.values())), 1),
    }
    return summary, {name: found[:5] for name, found in problems.items() if found}
