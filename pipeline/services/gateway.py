"""The gateway: HTTP for clients that do not speak Kafka.

    POST /tasks[?experiment=E&group_size=N&priority=P]    one task or a list, as in a tasks file; answers their ids
    POST /cancel {"rollout" | "group" | "experiment": id}
    POST /pause, /resume {"experiment": id}
    POST /v1/traces                                       spans by OTLP, from agents' own processes
    GET  /load                                            what waits and who works, for autoscalers
    GET  /rollouts/{id}, /metrics, /asyncapi.json, /livez, /readyz
    GET  /                                                the pages for a browser (`pipeline.ui`), below /ui

It keeps no state: several gateways may serve one deployment.
"""

import asyncio
import hmac
import json
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Annotated, Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, RedirectResponse, Response
from starlette.routing import Mount, Route

from millstream.consumers.log.port import Log
from millstream.consumers.sink.clickhouse_connection import EMBEDDED
from millstream.pipeline.services.faststream.asyncapi import asyncapi_document
from millstream.pipeline.services.fleet_load import FleetLoad, FleetLoadReader, LoadPolicy
from millstream.pipeline.services.health import Health
from millstream.pipeline.services.otlp_receiver import PATH as TRACES
from millstream.pipeline.services.otlp_receiver import OtlpPolicy, OtlpReceiver
from millstream.pipeline.services.rollout_status import read_rollout_status
from millstream.pipeline.services.serve_asgi import body_of, for_this_machine
from millstream.pipeline.ui.app import ui_app
from millstream.pipeline.ui.source import Source
from millstream.producers.control import cancel_record, pause_record, publish_control
from millstream.producers.instruments import Values
from millstream.producers.log.port import Producer
from millstream.producers.tasks import TaskLine, TaskPublisher, group_of
from millstream.schemas import metrics
from millstream.schemas.config.settings import Settings
from millstream.schemas.errors import CodecError, ConfigError, MillstreamError, TooLarge
from millstream.schemas.metrics import Metric
from millstream.schemas.spans import semconv
from millstream.schemas.wire.log import Partition
from millstream.schemas.wire.records import RolloutTask

logger = logging.getLogger(__name__)

OR_SQL: Final = "for rollouts that have ended ask the store: `millstream rollouts`"
OPEN_PATHS: Final = ("/", "/livez", "/readyz", TRACES)  # probes have no token, attempts have keys
PAGES: Final = "/ui"  # they ask for the token in a form
NO_STORE: Final = (
    "the gateway opens no embedded store, which belongs to one process: start the sink with --query-port 8123 and this "
    "gateway with MILLSTREAM_CLICKHOUSE_DSN=clickhouse://127.0.0.1:8123"
)


@dataclass(frozen=True)
class GatewayPolicy:
    max_body_bytes: int = 64 << 20  # of a request
    max_rollouts: int = 10_000  # of a request: its tasks times group_size
    max_published_bytes: int = 256 << 20  # of a request's rollouts; they are all encoded before the first is sent
    body_s: float = 60.0  # for it to arrive
    ready_s: float = 2.0  # for Kafka to answer a readiness probe; probes wait a few seconds
    status_s: float = 10.0  # for reading a rollout's status; the older the rollout, the more of the log is read
    status_reads: int = 4  # at a time; each holds a connection to Kafka
    otlp: OtlpPolicy = field(default_factory=OtlpPolicy)
    load: LoadPolicy = field(default_factory=LoadPolicy)


class PublishOptions(BaseModel):
    """Query of ``POST /tasks``."""

    model_config = ConfigDict(extra="forbid")

    experiment: str = ""
    group_size: int = Field(1, ge=1, le=10_000)
    priority: Literal["high", "normal", "low"] = "normal"


Name = Annotated[str, Field(min_length=1, max_length=1000)]
One = Field(min_length=1, max_length=1)
CANCEL: Final = TypeAdapter[Any](Annotated[dict[Literal["rollout", "group", "experiment"], Name], One])
PAUSE: Final = TypeAdapter[Any](Annotated[dict[Literal["experiment"], Name], One])
OPTIONS: Final = TypeAdapter(PublishOptions)
LINES: Final = TypeAdapter(list[TaskLine])


class Refused(Exception):
    """A request that can't be served. ``problems`` are JSON."""

    def __init__(self, http_status: int, *problems: dict[str, Any] | str) -> None:
        self.http_status = http_status
        self.problems = problems


class Gateway:
    """An ASGI application, `app`."""

    def __init__(
        self, log: Log, producer: Producer, settings: Settings, health: Health, policy: GatewayPolicy = GatewayPolicy()
    ) -> None:
        self._log = log
        self._producer = producer
        self._settings = settings
        self._topics = settings.topics
        self._tasks = TaskPublisher(producer, settings)
        self._policy = policy
        self._status_reads = asyncio.Semaphore(policy.status_reads)
        self._load = FleetLoadReader(log, self._topics, policy.load)
        self._health = health
        receiver = OtlpReceiver(producer, settings, policy.otlp)
        health.export(metrics.SPANS, lambda: {(semconv.SOURCE_OTLP,): receiver.stored})
        self._export_load()
        topics = Response(asyncapi_document(self._topics), media_type="application/json")
        token = settings.gateway_token.get_secret_value()
        no_store = NO_STORE if settings.clickhouse_dsn.startswith(EMBEDDED) else ""
        self.pages = Source(settings, log, no_store=no_store)
        self.app = Starlette(
            routes=[
                Route("/", RedirectResponse(f"{PAGES}/", 307)),
                Mount(PAGES, ui_app(self.pages, token)),
                Route("/tasks", self._publish, methods=["POST"]),
                Route("/cancel", self._cancel, methods=["POST"]),
                Route("/pause", self._pause, methods=["POST"]),
                Route("/resume", self._pause, methods=["POST"]),
                Route(TRACES, receiver.receive, methods=["POST"]),
                Route("/rollouts/{rollout_id}", self._rollout),
                Route("/load", self._answer_load),
                Route("/metrics", self._metrics),
                Route("/livez", health.respond),
                Route("/readyz", self._is_ready),
                Route("/asyncapi.json", topics),
            ],
            middleware=[Middleware(BaseHTTPMiddleware, dispatch=_gate(token))],
            exception_handlers={Refused: _refused, MillstreamError: _failed},
        )

    def _export_load(self) -> None:
        def export(metric: Metric, values: Callable[[FleetLoad], Values]) -> None:
            """What the last scrape has read; absent if the log could not be read."""
            self._health.export(metric, lambda: None if (load := self._load.last) is None else values(load))

        export(metrics.UNCLAIMED, lambda load: {(priority,): n for priority, n in load.unclaimed.tasks.items()})
        export(metrics.OLDEST_UNCLAIMED, lambda load: load.unclaimed.oldest_s)
        export(metrics.FLEET_SLOTS, lambda load: load.slots)
        export(metrics.FLEET_RUNNING, lambda load: load.running)

    async def _answer_load(self, _: Request) -> Response:
        return JSONResponse((await self._load.read()).to_json())

    async def _metrics(self, request: Request) -> Response:
        try:
            await self._load.read()
        except MillstreamError as error:
            logger.warning("the load of the deployment is missing among the metrics: %s", error)
        return await self._health.respond(request)

    async def _publish(self, request: Request) -> Response:
        options = _checked(OPTIONS, dict(request.query_params))
        body = await self._json(request)
        lines: list[TaskLine] = _checked(LINES, body if isinstance(body, list) else [body])
        count, limit = len(lines) * options.group_size, self._policy.max_rollouts
        if count > limit:
            message = f"{len(lines):,} tasks × group_size {options.group_size:,} are {count:,} rollouts, of at most "
            raise Refused(422, {"field": "group_size", "message": f"{message}{limit:,}; publish in several requests"})
        tasks: list[RolloutTask] = []
        total, limit = 0, self._policy.max_published_bytes
        for index, line in enumerate(lines):
            try:
                group = group_of(
                    line,
                    self._settings,
                    size=options.group_size,
                    priority=options.priority,
                    experiment_id=options.experiment,
                )
                total += len(group) * len(self._tasks.encoded(group[0]))
            except (ConfigError, CodecError, TooLarge) as error:
                raise Refused(422, {"index": index, "field": "input", "message": str(error)}) from None
            if total > limit:
                raise Refused(413, f"the rollouts have more than {limit:,} bytes in all; publish in several requests")
            tasks += group
        await self._tasks.publish(tasks)
        ids = [{"rollout_id": task.rollout_id, "group_id": task.group_id} for task in tasks]
        return JSONResponse({"published": ids}, 202)

    async def _cancel(self, request: Request) -> Response:
        body = _checked(CANCEL, await self._json(request))
        ((scope, name),) = body.items()
        await publish_control(self._producer, self._topics, cancel_record(scope, name))
        return JSONResponse({"cancelled": body}, 202)

    async def _pause(self, request: Request) -> Response:
        name = _checked(PAUSE, await self._json(request))["experiment"]
        paused = request.scope["path"] == "/pause"
        await publish_control(self._producer, self._topics, pause_record(name, paused))
        return JSONResponse({"experiment": name, "paused": paused}, 202)

    async def _rollout(self, request: Request) -> Response:
        rollout_id = request.path_params["rollout_id"]
        try:
            async with asyncio.timeout(self._policy.status_s), self._status_reads:
                found = await read_rollout_status(self._log, self._topics, rollout_id)
        except TimeoutError:
            raise Refused(503, f"the log can't be read in time for rollout {rollout_id}; {OR_SQL}") from None
        if found is None:
            raise Refused(404, f"the log holds nothing of rollout {rollout_id}; {OR_SQL}")
        return JSONResponse(found)

    async def _json(self, request: Request) -> Any:
        # Browsers send this content type to another site only if that site allows it: no web page can publish here.
        if request.headers.get("content-type", "").partition(";")[0].strip() != "application/json":
            raise Refused(415, "send Content-Type: application/json")
        limit, seconds = self._policy.max_body_bytes, self._policy.body_s
        too_large = Refused(413, f"the body is larger than {limit:,} bytes; publish in several requests")
        late = Refused(408, f"the body did not arrive within {seconds:g} s")
        try:
            return json.loads(await body_of(request, limit, seconds, too_large, late))
        except (ValueError, RecursionError) as error:
            raise Refused(400, f"the body is not JSON: {error}") from None

    async def _is_ready(self, _: Request) -> Response:
        consumer = self._log.consumer()
        try:
            async with asyncio.timeout(self._policy.ready_s):
                await consumer.end_offsets([Partition(self._topics.control, 0)])
        except (TimeoutError, MillstreamError) as error:
            raise Refused(503, f"Kafka does not answer (kafka_bootstrap_servers): {error}") from None
        finally:
            await consumer.close()
        return JSONResponse({"status": "ok"})


def _checked(adapter: TypeAdapter[Any], value: Any) -> Any:
    try:
        return adapter.validate_python(value)
    except ValidationError as error:
        problems = []
        for e in error.errors(include_url=False, include_input=False):
            path = list(e["loc"])
            index = {"index": path.pop(0)} if path and isinstance(path[0], int) else {}
            problems.append({**index, "field": ".".join(map(str, path)), "message": e["msg"]})
        raise Refused(422, *problems) from None


def _gate(token: str) -> Callable[[Request, Callable[[Request], Awaitable[Response]]], Awaitable[Response]]:
    """Requires the token or, if there is none, a request to a name of this machine."""

    async def dispatch(request: Request, call_next: Callable[[Request], Awaitable[Response]]) -> Response:
        path = request.scope["path"]  # request.url holds what the caller wrote into Host
        if path not in OPEN_PATHS and not f"{path}/".startswith(f"{PAGES}/"):
            given = request.headers.get("authorization", "")
            if token and not hmac.compare_digest(given.encode(), f"Bearer {token}".encode()):
                message = "send Authorization: Bearer TOKEN, with the gateway_token of this deployment"
                return JSONResponse({"errors": [message]}, 401, {"WWW-Authenticate": "Bearer"})
            if not token and not for_this_machine(request):
                return JSONResponse({"errors": ["without a token the gateway answers requests to localhost only"]}, 403)
        return await call_next(request)

    return dispatch


async def _refused(_: Request, error: Exception) -> Response:
    assert isinstance(error, Refused)
    return JSONResponse({"errors": error.problems}, error.http_status)


async def _failed(_: Request, error: Exception) -> Response:
    return JSONResponse({"errors": [str(error)]}, 422 if isinstance(error, CodecError) else 503)
