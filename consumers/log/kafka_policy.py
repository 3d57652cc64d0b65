"""Time-outs and limits of both Kafka consumers."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ConsumerPolicy:
    call_s: float = 10.0  # for one call to the brokers, such as a commit
    retry_s: float = 0.05  # between two requests for offsets, while a leader moves
    renew_s: float = 1.0  # from a client's end by a right that is missing until the next client tries
    session_ms: int = 6_000  # after which a killed member's partitions move on
    heartbeat_ms: int = 1_000
    # A runner without a free slot reads nothing for as long as its attempts run: polls say nothing about its health.
    max_poll_interval_ms: int = 86_400_000
    # Also how long a resumed or newly assigned partition may wait for a fetch in flight to the same broker.
    fetch_wait_ms: int = 100
    fetch_bytes: int = 50 << 20  # of one answer; more if a single record may be larger
    slice_s: float = 0.1  # after which a waiting poll notices that it was cancelled, or may read other partitions
