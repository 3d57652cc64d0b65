"""Proves from the log, with nothing of Millstream's: each published rollout has ended exactly once, and so on.

Reads the topics with a plain Kafka client (read_committed) and the packaged Avro schemas with fastavro. Usage:
``check(bootstrap, prefix, schemas_folder, ledger, published)`` → counts, and what is wrong by name (some of each).
"""

import json
from collections import Counter, defaultdict
from io import BytesIO
from pathlib import Path

import fastavro
from confluent_kafka import Consumer, TopicPartition
from fastavro.schema import fingerprint, to_parsing_canonical_form


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
    """Every committed record of a topic, each partition in its order: (name, fields, partition, offset)."""
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
            body = message.value()
            assert body[:2] == b"\xc3\x01", f"{topic}[{message.partition()}]@{message.offset()} is no record"
            name, schema = known[body[2:10]]
            record = fastavro.schemaless_reader(BytesIO(body[10:]), schema, None)
            yield name, record, message.partition(), message.offset()
    consumer.close()


def check(bootstrap, prefix, schemas_folder, ledger, published):
    """``published``: rollout ids. ``ledger``: the agents' own file."""
    known = schemas(schemas_folder)
    ends, triplets = Counter(), defaultdict(Counter)
    chosen, outcome, triplet_attempts = {}, {}, defaultdict(set)
    for name, record, *_ in read(bootstrap, f"{prefix}.triplets", known):
        if name == "RolloutEnd":
            ends[record["rollout_id"]] += 1
            chosen[record["rollout_id"]] = record["attempt_id"]
            outcome[record["rollout_id"]] = record["status"]
        else:
            triplets[record["rollout_id"]][record["turn"]] += 1
            triplet_attempts[record["rollout_id"]].add(record["attempt_id"])
    calls, claims, over, ignored = Counter(), defaultdict(list), {}, 0
    seen, silent, given_up, ended_in_events = {}, set(), set(), set()
    for name, record, *_ in read(bootstrap, f"{prefix}.events", known):
        rollout = record.get("rollout_id")
        if name == "Span" and record["source"] == "proxy" and record["kind"] == "llm":
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
    for line in Path(ledger).read_text().splitlines():
        entry = json.loads(line)
        first, _ = ran.get(entry["attempt"], (entry["time"], 0))
        ran[entry["attempt"]] = first, entry["time"]
        if entry["event"] == "start":
            starts[entry["attempt"]] += 1
            attempts_of[entry["rollout"]].add(entry["attempt"])

    lost = [r for r in published if ends[r] == 0]
    duplicate_ends = [r for r, n in ends.items() if n > 1]
    duplicate_triplets = [r for r, turns in triplets.items() if any(n > 1 for n in turns.values())]
    wrong = []
    for rollout, status in outcome.items():
        if status == "succeeded":
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
        if len(attempts) > 1 + causes:
            causeless.append(f"{rollout}: run {len(attempts)} times, but only {causes} attempts were lost or failed")
    problems = {
        "lost": lost,
        "duplicate_ends": duplicate_ends,
        "duplicate_triplets": duplicate_triplets,
        "wrong_sets": wrong,
        "attempts_run_twice": twice,
        "run_again_without_cause": causeless,
        "ended_but_never_published": sorted(set(ends) - set(published)),
    }
    summary = {name: len(found) for name, found in problems.items()} | {
        "published": len(published),
        "ended": sum(1 for r in published if ends[r]),
        "succeeded": sum(status == "succeeded" for status in outcome.values()),
        "zombie_results_ignored": ignored,
        "executions": sum(starts.values()),
        # of attempts that no rollout ended with, from the agents' first line to their last one
        "wasted_agent_seconds": round(sum(b - a for of, (a, b) in ran.items() if of not in set(chosen.values())), 1),
    }
    return summary, {name: found[:5] for name, found in problems.items() if found}
