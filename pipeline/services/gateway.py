"""The monitor: what happens just now, and HTTP for those who do not speak Kafka.

    POST /tasks[?experiment=E&group_size=N&priority=P]    one task or a list, as in a tasks file; answers their ids
    POST /cancel {"rollout" | "group" | "experiment": id}
    POST /pause, /resume {"experiment": id}
    POST /v1/traces                                       spans by OTLP, of agents' own processes
    GET  /rollouts/{id}, /kpis, /metrics, /asyncapi, /livez, /readyz

It belongs to no group and commits nothing: each monitor reads everything, beginning `REPLAY_S` before its start.
"""

import asyncio
import hmac
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import asynccontextmanager
from typing import Annotated, Any, Final, Literal

from faststream.asgi import AsgiFastStream, AsyncAPIRoute
from faststream.kafka import KafkaBroker
from faststream.kafka.prometheus import KafkaPrometheusMiddleware
from faststream.specification import AsyncAPI
from prometheus_client import make_asgi_app
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from millstream.consumers.log.kafka_log import KafkaLog
from millstream.pipeline.addresses import is_loopback
from millstream.pipeline.services.broker import Codec, broker
from millstream.pipeline.services.health import Health, watched
from millstream.pipeline.services.http import for_this_machine, limited, listen, serve_until_signal
from millstream.pipeline.services.kpis import QUANTILES, Kpis
from millstream.pipeline.services.otlp_receiver import PATH as TRACES
from millstream.pipeline.services.otlp_receiver import OtlpReceiver
from millstream.producers.control import cancel_record, pause_record, publish_control
from millstream.producers.log.port import Producer, closing
from millstream.producers.tasks import TaskLine, TaskPublisher, group_of
from millstream.schemas.config.settings import Settings
from millstream.schemas.errors import CodecError, ConfigError, LogUnavailable, MillstreamError
from millstream.schemas.wire import codec, records
from millstream.schemas.wire.records import AttemptEvent, RolloutEnd, RolloutTask, Worker
from millstream.schemas.wire.topics import PRIORITIES, Topics

REPLAY_S: Final = 3600
MAX_BODY: Final = 64 << 20  # bytes of a request
BATCH: Final = 500
READY_S: Final = 2.0
OPEN_PATHS: Final = ("/livez", "/readyz", TRACES)  # for probes, which have no token, and for attempts, which have keys


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
    """A request that can't be served; ``problems`` are JSON."""

    def __init__(self, http_status: int, *problems: dict[str, Any] | str) -> None:
        self.http_status = http_status
        self.problems = problems


class Monitor:
    """An ASGI application (`app`); it reads the log from its start-up to its shutdown."""

    def __init__(self, producer: Producer, settings: Settings, health: Health) -> None:
        self.kpis = Kpis()
        self._producer = producer
        self._settings = settings
        self._topics = settings.topics
        self._tasks = TaskPublisher(producer, self._topics)
        self._health = health
        health.registry.register(self)
        self._broker = broker(settings)
        self._broker.add_middleware(KafkaPrometheusMiddleware(registry=health.registry, app_name="millstream_monitor"))
        topics = [self._topics.events, self._topics.workers, *map(self._topics.tasks, PRIORITIES)]
        self._subscriber = self._broker.subscriber(
            *topics,
            batch=True,
            max_records=BATCH,
            codec=Codec(self._broker, (RolloutTask, AttemptEvent, RolloutEnd, Worker)),  # spans are not even decoded
            include_in_schema=False,
        )
        self._subscriber(self._fold)
        page = AsgiFastStream(
            self._broker,
            asgi_routes=[("/metrics", make_asgi_app(health.registry))],
            asyncapi_path=AsyncAPIRoute("/asyncapi", try_it_out_path=None),
            specification=AsyncAPI(_described(self._topics), title="Millstream"),
        )
        token = settings.monitor_token.get_secret_value()
        self.app = Starlette(
            routes=[
                Route("/tasks", self._publish, methods=["POST"]),
                Route("/cancel", self._cancel, methods=["POST"]),
                Route("/pause", self._pause, methods=["POST"]),
                Route("/resume", self._pause, methods=["POST"]),
                Route(TRACES, OtlpReceiver(producer, settings).receive, methods=["POST"]),
                Route("/rollouts/{rollout_id}", self._rollout),
                Route("/kpis", self._kpis),
                Route("/livez", self._alive),
                Route("/readyz", self._is_ready),
                *(Route(path, page) for path in ("/metrics", "/asyncapi", "/asyncapi.json")),
            ],
            middleware=[Middleware(BaseHTTPMiddleware, dispatch=_gate(token))],
            exception_handlers={Refused: _refused, MillstreamError: _failed},
            lifespan=self._lifespan,
        )

    @asynccontextmanager
    async def _lifespan(self, _: Starlette) -> AsyncIterator[None]:
        async with self._broker:
            await self._broker.start()
            self._watch_polls()
            await self._replay()
            yield

    def _watch_polls(self) -> None:
        """FastStream has no place to ask for them."""
        getmany = self._subscriber.consumer.getmany

        async def watched(*args: Any, **kwargs: Any) -> Any:
            try:
                return await getmany(*args, **kwargs)
            finally:
                self._health.polled(self)

        self._subscriber.consumer.getmany = watched

    async def _replay(self) -> None:
        """Goes back: to the beginning of what is compacted, and by a time elsewhere."""
        consumer = self._subscriber.consumer
        # The reset to the end, which is under way, would undo a seek.
        await asyncio.gather(*map(consumer.position, consumer.assignment()))
        workers = [tp for tp in consumer.assignment() if tp.topic == self._topics.workers]
        since = int((time.time() - REPLAY_S) * 1000)
        others = dict.fromkeys(consumer.assignment() - set(workers), since)
        for partition, found in (await consumer.offsets_for_times(others)).items():
            if found is not None:
                consumer.seek(partition, found.offset)
        await consumer.seek_to_beginning(*workers)

    async def _fold(self, batch: list[Any]) -> None:
        for record in batch:
            self.kpis.add(record)

    # --- HTTP

    async def _publish(self, request: Request) -> Response:
        options = _checked(OPTIONS, dict(request.query_params))
        body = await _json(request)
        lines: list[TaskLine] = _checked(LINES, body if isinstance(body, list) else [body])
        tasks: list[RolloutTask] = []
        for index, line in enumerate(lines):
            tasks += group_of(
                line,
                self._settings,
                size=options.group_size,
                priority=options.priority,
                experiment_id=options.experiment,
            )
            size, limit = len(codec.encode(tasks[-1])), self._settings.max_record_bytes
            if size > limit:
                message = f"the task has {size:,} bytes, max_record_bytes is {limit:,}"
                raise Refused(422, {"index": index, "field": "input", "message": message})
        await self._tasks.publish(tasks)
        ids = [{"rollout_id": task.rollout_id, "group_id": task.group_id} for task in tasks]
        return JSONResponse({"published": ids}, 202)

    async def _cancel(self, request: Request) -> Response:
        body = _checked(CANCEL, await _json(request))
        ((scope, name),) = body.items()
        await publish_control(self._producer, self._topics, cancel_record(scope, name))
        return JSONResponse({"cancelled": body}, 202)

    async def _pause(self, request: Request) -> Response:
        name = _checked(PAUSE, await _json(request))["experiment"]
        paused = request.scope["path"] == "/pause"
        await publish_control(self._producer, self._topics, pause_record(name, paused))
        return JSONResponse({"experiment": name, "paused": paused}, 202)

    async def _rollout(self, request: Request) -> Response:
        rollout_id = request.path_params["rollout_id"]
        found = self.kpis.rollout(rollout_id)
        if found is None:
            raise Refused(404, f"this monitor knows of no rollout {rollout_id}; for old ones ask `millstream rollouts`")
        return JSONResponse(found)

    async def _kpis(self, _: Request) -> Response:
        return JSONResponse(self.kpis.snapshot(time.time_ns()))

    async def _alive(self, _: Request) -> Response:
        http_status, body = self._health.answer("/livez")
        return PlainTextResponse(body, http_status)

    async def _is_ready(self, _: Request) -> Response:
        if await self._broker.ping(READY_S):
            return JSONResponse({"status": "ok"})
        raise Refused(503, "Kafka does not answer (kafka_bootstrap_servers)")

    def collect(self) -> Iterable[Metric]:
        """Prometheus' collector: the KPIs at this moment."""
        now = self.kpis.snapshot(time.time_ns())
        for name in ("rollouts_per_second", "success_rate", "slots", "running", "utilisation"):
            if now[name] is not None:
                yield GaugeMetricFamily(f"millstream_{name}", f"{name}, as in /kpis", now[name])
        for name, title in (("latency_s", "From published to ended"), ("queued_s", "From published to claimed")):
            gauge = GaugeMetricFamily(f"millstream_{name[:-2]}_seconds", f"{title}.", labels=["quantile"])
            for quantile, value in zip(QUANTILES, now[name].values(), strict=True):
                if value is not None:
                    gauge.add_metric([str(quantile)], value)
            yield gauge
        ended = CounterMetricFamily("millstream_rollouts_ended", "Since the start.", labels=["mode", "status"])
        for labels, count in self.kpis.ended.items():
            ended.add_metric(labels, count)
        yield ended
        yield CounterMetricFamily("millstream_retries", "Of ended rollouts.", self.kpis.retries)
        yield CounterMetricFamily(
            "millstream_lost_attempts", "Attempts lost, of ended rollouts.", self.kpis.lost_attempts
        )


def _described(topics: Topics) -> KafkaBroker:
    """All topics with what they hold; this broker is never started."""
    page = KafkaBroker()
    holds: dict[str, Any] = {
        **dict.fromkeys(map(topics.tasks, PRIORITIES), RolloutTask),
        topics.events: AttemptEvent | records.Span | RolloutEnd,
        topics.triplets: records.Triplet | RolloutEnd,
        topics.control: records.Control,
        topics.workers: Worker,
        topics.dead: records.DeadLetter,
    }
    for topic in topics.all:
        about = f"Key: {topic.key}. Partitions: {topic.partitions}, {topic.cleanup}. Avro single-object encoding."
        page.publisher(topic.name, title=topic.name, description=about, schema=holds[topic.name])
    return page


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


async def _json(request: Request) -> Any:
    # Browsers ask before they send this type to another site: a page that somebody visits can't publish here.
    if request.headers.get("content-type", "").partition(";")[0].strip() != "application/json":
        raise Refused(415, "send Content-Type: application/json")
    too_large = Refused(413, f"the body is larger than {MAX_BODY:,} bytes; publish in several requests")
    try:
        return json.loads(await limited(request, MAX_BODY, too_large).body())
    except (ValueError, RecursionError) as error:
        raise Refused(400, f"the body is not JSON: {error}") from None


def _gate(token: str) -> Callable[[Request, Callable[[Request], Awaitable[Response]]], Awaitable[Response]]:
    """Asks for the token; without one, that the request is meant for this machine."""

    async def dispatch(request: Request, call_next: Callable[[Request], Awaitable[Response]]) -> Response:
        if request.scope["path"] not in OPEN_PATHS:  # request.url is made of the Host header: a caller's to choose
            given = request.headers.get("authorization", "")
            if token and not hmac.compare_digest(given.encode(), f"Bearer {token}".encode()):
                message = "send Authorization: Bearer TOKEN, with the monitor_token of this deployment"
                return JSONResponse({"errors": [message]}, 401, {"WWW-Authenticate": "Bearer"})
            if not token and not for_this_machine(request):
                return JSONResponse({"errors": ["without a token the monitor answers for localhost alone"]}, 403)
        return await call_next(request)

    return dispatch


async def _refused(_: Request, error: Exception) -> Response:
    assert isinstance(error, Refused)
    return JSONResponse({"errors": error.problems}, error.http_status)


async def _failed(_: Request, error: Exception) -> Response:
    return JSONResponse({"errors": [str(error)]}, 422 if isinstance(error, CodecError) else 503)


async def serve_monitor(settings: Settings, host: str, port: int) -> None:
    """Serves until SIGTERM or SIGINT. Raises `ConfigError` if it would be open to others without a token, or if the
    address can't be had."""
    if not is_loopback(host) and not settings.monitor_token.get_secret_value():
        raise ConfigError(
            f"--host {host} is open to others: set monitor_token (MILLSTREAM_MONITOR_TOKEN), or use 127.0.0.1"
        )
    log = KafkaLog(settings)
    await log.check()
    listener = listen(host, port)
    async with (
        closing(log.producer()) as producer,
        watched(log, settings.topics, "monitor", 0, asyncio.Event()) as health,
    ):
        started = await serve_until_signal(Monitor(producer, settings, health).app, listener)
    if not started:
        raise LogUnavailable("the monitor could not start to read the log; the cause is logged above")
