"""The role that serves a model: it keeps vLLM running, carries out commands from the control topic, and publishes a
routing table once the weights that the table names are served."""

import asyncio
import logging
from pathlib import Path

from millstream.consumers.control import ControlFollower
from millstream.consumers.log.port import Log
from millstream.pipeline.models.server import UpdateFailed
from millstream.pipeline.models.vllm_server import VllmServer
from millstream.producers.control import publish_control
from millstream.schemas.control import Arm, ModelAnswer, ModelCommand, RoutingTable, ServerState
from millstream.schemas.errors import ConfigError
from millstream.schemas.ids import new_id
from millstream.schemas.wire.records import Control
from millstream.schemas.wire.topics import Topics

logger = logging.getLogger(__name__)


class ModelRole:
    """Serves ``model``, which proxies reach at the upstream of that name in their settings. One process for a model."""

    def __init__(
        self, log: Log, topics: Topics, server: VllmServer, model: str, upstream: str, report_s: float = 1.0
    ) -> None:
        """A change of the replicas is reported within ``report_s``."""
        self._report_s = report_s
        self._log = log
        self._topics = topics
        self._server = server
        self._model = model
        self._upstream = upstream
        self._producer = log.producer()
        self._follower = ControlFollower(log, topics, on_control=self._on_control)
        self._reported: ServerState | None = None
        self._waiting: dict[str, Control] = {}  # commands without an answer, in the order of the log
        self._command_came = asyncio.Event()

    async def run(self, stop: asyncio.Event) -> None:
        """Until ``stop``. Raises `MillstreamError` if the model can't be served."""
        try:
            await self._follower.start()
            used = self._used(self._follower.routing)
            adapters, whole = {}, None  # what was served when the role last ended
            for arm in used:
                weights = self._server.weights(arm.weights, arm.version, lora=self._is_adapter(arm))
                if self._is_adapter(arm):
                    adapters[arm.served_as] = weights
                else:
                    whole = weights
            await self._server.start(whole, adapters)
            if not used:
                base = self._server.base
                arm = self._arm(self._model, base.version, base.folder)
                await self._publish(self._follower.routing.deploy(self._model, arm), "")
            while not stop.is_set():
                await self._report_state()
                while self._waiting:
                    await self._answer(next(iter(self._waiting.values())))
                self._command_came.clear()
                waits = [asyncio.ensure_future(event.wait()) for event in (stop, self._command_came)]
                await asyncio.wait(waits, timeout=self._report_s, return_when=asyncio.FIRST_COMPLETED)
                for wait in waits:
                    wait.cancel()
        finally:
            await self._follower.close()
            await self._server.close()
            await asyncio.to_thread(self._producer.close)

    def _on_control(self, record: Control) -> None:
        if record.kind == ModelCommand.kind:
            self._waiting[record.name] = record
            self._command_came.set()
        elif record.kind == ModelAnswer.kind:
            self._waiting.pop(record.name, None)

    async def _answer(self, record: Control) -> None:
        """Carries out a command and answers it. Commands about other models are left to their servers."""
        del self._waiting[record.name]
        try:
            command = ModelCommand.from_control(record)
            if command.model != self._model:
                return
            mark = f" [{command.command_id}]"
            # If a predecessor ended in between, the table is published and the answer is not.
            if not self._follower.routing.reason.endswith(mark):
                await self._publish(await self._do(command), mark)
            answer = ModelAnswer(command_id=record.name, table_id=self._follower.routing.table_id)
        except (ConfigError, UpdateFailed, OSError, ValueError) as error:  # of a folder's name, for example
            answer = ModelAnswer(command_id=record.name, error=str(error))
        await self._report_state()
        await publish_control(self._producer, self._topics, answer.to_control())

    async def _do(self, command: ModelCommand) -> RoutingTable:
        """The next table; what it needs is served when this returns."""
        known = self._follower.routing
        if command.action == "deploy":
            name = f"{self._model}@{command.version}" if command.lora else self._model
            arm = self._arm(name, command.version, Path(command.folder))
            for other in known.models.get(self._model, ()):
                if other.version == arm.version and (other.served_as, other.weights) != (name, arm.weights):
                    raise ConfigError(
                        f"{self._model} {arm.version} names {other.weights}: give these weights another version"
                    )
            table = known.deploy(self._model, arm)
        elif command.action == "rollback":
            table = known.rollback(self._model, command.version)
        else:
            table = known.split(self._model, command.shares)
        used = self._used(table)
        whole = [arm.version for arm in used if not self._is_adapter(arm)]
        if len(whole) > 1:
            raise ConfigError(
                f"{self._model}: {' and '.join(whole)} are whole models, and a server has one at a time; "
                "serve one of them elsewhere, or deploy LoRA adapters"
            )
        for arm in used:
            if self._is_adapter(arm) and arm.served_as not in self._server.adapters:
                await self._server.deploy(Path(arm.weights), arm.version, lora=True)
            elif not self._is_adapter(arm) and (arm.version != self._server.version or command.action == "deploy"):
                await self._server.deploy(Path(arm.weights), arm.version)
        return table

    async def _publish(self, table: RoutingTable, mark: str) -> None:
        """Publishes this model's part of ``table``, beside what other models' servers have published meanwhile."""
        await self._follower.wait_until_current()
        models = {**self._follower.routing.models, self._model: table.models[self._model]}
        whole = RoutingTable(table_id=new_id(), models=models, reason=table.reason + mark)
        await publish_control(self._producer, self._topics, whole.to_control())
        await self._follower.wait_until_current()  # the next command builds on it
        kept = {arm.served_as for arm in models[self._model]}
        for name in set(self._server.adapters) - kept:
            await self._server.remove_adapter(name)

    async def _report_state(self) -> None:
        """Publishes what is served, if that has changed."""
        state = ServerState(
            upstream=self._upstream,
            model=self._model,
            version=self._server.version,
            adapters=tuple(self._server.adapters),
            replicas=tuple(
                {"url": r.process.url, "alive": r.alive, "restarts": r.restarts} for r in self._server.replicas
            ),
        )
        if state != self._reported:
            await publish_control(self._producer, self._topics, state.to_control())
            self._reported = state

    def _used(self, table: RoutingTable) -> list[Arm]:
        """The arms that this server has to serve."""
        arms = table.models.get(self._model, ())
        return [arm for arm in arms if arm.weight > 0 and arm.upstream == self._upstream]

    def _arm(self, served_as: str, version: str, folder: Path) -> Arm:
        return Arm(version=version, upstream=self._upstream, served_as=served_as, weights=str(folder.resolve()))

    def _is_adapter(self, arm: Arm) -> bool:
        return arm.served_as != self._model
