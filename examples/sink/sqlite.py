"""Rewards into a SQLite file, as they come: a sink of one's own. Run it with
``millstream sink --sink examples.sink.sqlite:RewardsSink``; it takes nothing away from other sinks."""

import sqlite3
from contextlib import closing

import millstream as ms
from millstream.consumers.sink.port import Unusable
from millstream.schemas.errors import StoreError
from millstream.schemas.wire.records import Span

FILE = "rewards.db"
TABLE = """
CREATE TABLE IF NOT EXISTS rewards (
    topic TEXT, partition INTEGER, offset INTEGER, rollout_id TEXT, name TEXT, value REAL,
    PRIMARY KEY (topic, partition, offset)
)
"""


class RewardsSink:
    """A `ms.Sink`. A record that comes again has the same place, and that is the key: it is stored once."""

    def __init__(self, settings: ms.Settings) -> None:
        with closing(sqlite3.connect(FILE)) as database, database:
            database.execute(TABLE)

    def write(self, batch: ms.Batch) -> list[Unusable]:
        decoded, unusable = batch.decoded()
        rows = [
            (*record.partition, record.offset, span.rollout_id, span.reward_name, span.reward)
            for record, span in decoded
            if isinstance(span, Span) and span.reward is not None
        ]
        try:  # calls come from different threads, and a connection belongs to one
            with closing(sqlite3.connect(FILE)) as database, database:
                database.executemany("INSERT OR IGNORE INTO rewards VALUES (?, ?, ?, ?, ?, ?)", rows)
        except sqlite3.OperationalError as error:  # locked, or the disk is full: it may help to try again
            raise StoreError(f"{FILE}: {error}") from error
        return unusable

    def flush(self) -> None:
        """Nothing is left to do: the transaction in `write` is durable."""

    def close(self) -> None:
        """No connection is open between two calls."""
