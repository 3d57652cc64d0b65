"""Attempts that a process makes itself, without a runner: their claim, spans, model calls and end."""

import asyncio
from collections.abc import Sequence
from dataclasses import replace

from millstream.consumers.log.port import Log
from millstream.consumers.runner.attempt_writer import AttemptWriter
from millstream.consumers.runner.claims import Claim, preparing
from millstream.consumers.runner.outcome import Outcome, stopped_by
from millstream.consumers.runner.proxies import Proxies, ProxyNotClosed
from millstream.producers.blob_store import Blobs
from millstream.producers.workers import new_worker_id
from millstream.schemas.attempt_keys import attempt_path
from millstream.schemas.config.settings import Settings
from millstream.schemas.control import Resources
from millstream.schemas.ids import new_id
from millstream.schemas.wire import status
from millstream.schemas.wire.log import KIND_HEADER
from millstream.schemas.wire.records import RolloutTask


class OwnAttempts:
    """What the attempts of this process share. ``proxy_urls``: the proxies of their model calls; none without any."""

    def __init__(self, log: Log, settings: Settings, proxy_urls: Sequence[str] = ()) -> None:
        self.settings = settings
        self.producer = log.producer()
        self.worker_id = new_worker_id()
        self.blobs = Blobs(settings.blob_url)
        self.proxies = Proxies(proxy_urls, settings.proxy_secret.get_secret_value())

    async def close(self) -> None:
        await asyncio.to_thread(self.producer.close)
        self.blobs.close()
        await self.proxies.close()


class OwnAttempt:
    """One of them: `begin`, then `finish`. ``proxy_url`` and ``proxy_key`` are those of its model calls."""

    def __init__(self, task: RolloutTask, own: OwnAttempts) -> None:
        # It has no heartbeats, so its lease is its time limit.
        task = replace(task, lease_s=max(task.lease_s, task.timeout_s))
        nothing = Resources(resources_id="", experiment_id=task.experiment_id, items={})
        self.claim = Claim(task, new_id(), nothing)
        self.start = 0  # offset of its claim, once that is acknowledged
        self.writer = AttemptWriter(self.claim, own.producer, own.settings.topics, own.worker_id, own.blobs)
        self.proxy_url = own.proxies.choose(self.claim)
        self.proxy_key = own.proxies.key(self.claim) if self.proxy_url else ""
        self._own = own

    @property
    def base_url(self) -> str:
        """Of its model calls, without ``/v1``."""
        return self.proxy_url.rstrip("/") + attempt_path(self.claim.task.rollout_id, self.claim.attempt_id)

    def begin(self) -> None:
        def on_ack(error: Exception | None, offset: int) -> None:
            self.start = offset

        self._own.producer.send(
            self._own.settings.topics.events,
            preparing(self.claim.task, self.claim.attempt_id, self._own.worker_id),
            key=self.claim.task.rollout_id,
            headers={KIND_HEADER: status.PREPARING.encode()},
            on_ack=on_ack,
        )
        self.writer.started()

    async def finish(self, outcome: Outcome) -> Outcome:
        """Writes its end after everything else; returns how it has ended. Raises `LogError` if the log fails."""
        outcome, proxy_spans = replace(outcome, spans=self.writer.seal()), None
        if self.proxy_url:
            try:
                calls = await self._own.proxies.close_attempt(self.claim, self.proxy_url, self.proxy_key)
                proxy_spans, outcome = calls.made, calls.outcome(outcome)
            except ProxyNotClosed as error:
                outcome = stopped_by(status.LOST, error.cause, str(error))
        return await self.writer.finish(outcome, proxy_spans)
