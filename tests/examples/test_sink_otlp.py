"""The sink for tracing back ends, in front of one that reads what it gets, fails, and says no."""

import asyncio
import gzip
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import factories
import pytest
from google.rpc.status_pb2 import Status
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)
from sink_rig import IMPATIENT, eventually, publish, run_to_the_end

from examples.sink.otlp import ExportPolicy, OtlpSink, to_otlp
from millstream.consumers.log.memory_log import MemoryLog
from millstream.consumers.sink.port import Batch
from millstream.consumers.sink.sink import FlushPolicy, SinkRole
from millstream.schemas.config.settings import Settings, load_settings
from millstream.schemas.errors import ConfigError, StoreError
from millstream.schemas.spans import semconv
from millstream.schemas.spans.otlp import from_otlp
from millstream.schemas.wire import codec
from millstream.schemas.wire.log import LogRecord, Partition
from millstream.schemas.wire.records import Span


class BackEnd:
    """An OTLP receiver. ``answers`` are the next ones (status, headers); then it takes all but spans named bad."""

    def __init__(self) -> None:
        self.spans: list[Span] = []
        self.requests: list[dict[str, str]] = []
        self.answers: list[tuple[int, dict[str, str]]] = []
        self.rejects = 0
        backend = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                backend.requests.append({name.lower(): value for name, value in self.headers.items()})
                body = gzip.decompress(self.rfile.read(int(self.headers["Content-Length"])))
                found, refused = from_otlp(ExportTraceServiceRequest.FromString(body))
                assert not refused
                http_status, headers = backend.answers.pop(0) if backend.answers else (200, {})
                answer: Any = Status(message="no")
                if http_status == 200 and any(span.name == "bad" for span in found):
                    http_status = 400
                elif http_status == 200:
                    backend.spans += found
                    answer = ExportTraceServiceResponse()
                    answer.partial_success.rejected_spans = backend.rejects
                data = answer.SerializeToString()
                self.send_response(http_status)
                headers |= {"Content-Type": "application/x-protobuf", "Content-Length": str(len(data))}
                for name, value in headers.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *args: Any) -> None:
                """Says nothing."""

        self._handler = Handler
        self.start(0)

    def start(self, port: int) -> None:
        self._server = ThreadingHTTPServer(("127.0.0.1", port), self._handler)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))
        self._thread.start()

    @property
    def port(self) -> int:
        return int(self._server.server_address[1])

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


@pytest.fixture
def backend() -> Iterator[BackEnd]:
    made = BackEnd()
    yield made
    made.stop()


@pytest.fixture
def settings(backend: BackEnd, monkeypatch: pytest.MonkeyPatch) -> Settings:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", f"http://127.0.0.1:{backend.port}/v1/traces")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TRACES_HEADERS", "authorization=Bearer%20s3cret")
    return load_settings(kafka_partitions=3)


def batch(*spans: Span, token: str = "t") -> Batch:
    place = Partition(load_settings().topics.events, 0)
    return Batch([LogRecord(place, n, 0, s.rollout_id, codec.encode(s)) for n, s in enumerate(spans)], token)


def a_span(**fields: Any) -> Span:
    return factories.span(factories.task(), "a", trace_id="1" * 32, **fields)


async def test_every_span_arrives_although_the_back_end_is_away_for_a_while(
    backend: BackEnd, settings: Settings
) -> None:
    log = MemoryLog(settings.topics, encode=True)
    expected = publish(log, settings, 20)
    port = backend.port
    backend.stop()
    exporter = OtlpSink(settings, ExportPolicy(spans=7))
    sink = SinkRole(log, exporter, settings, name="otlp", flush=FlushPolicy(100), outage=IMPATIENT)
    running = asyncio.create_task(run_to_the_end(sink))
    await eventually(lambda: sink.stats.retries >= 3)
    assert "can't be reached" in (sink.trouble or "")
    backend.answers = [(503, {}), (200, {}), (401, {}), (404, {}), (200, {}), (429, {})]
    backend.start(port)
    await running
    assert sink.stats.dead_letters == 0
    assert len({span.span_id for span in backend.spans}) == len(backend.spans) == expected["spans"]
    assert {r["authorization"] for r in backend.requests} == {"Bearer s3cret"}


def test_a_span_that_is_refused_by_itself_is_the_only_one_to_go(backend: BackEnd, settings: Settings) -> None:
    spans = [a_span(name="bad" if n in (2, 5) else f"s{n}") for n in range(8)]
    unusable = OtlpSink(settings).write(batch(*spans, a_span(span_id="no hex")))
    assert [(u.record.offset, u.reason) for u in unusable] == [(n, "unstorable") for n in (2, 5, 8)]
    assert sorted(span.name for span in backend.spans) == sorted(s.name for s in spans if s.name != "bad")


def test_a_back_end_that_refuses_everything_makes_no_dead_letters(backend: BackEnd, settings: Settings) -> None:
    backend.answers = [(400, {})] * 2
    with pytest.raises(StoreError, match="even an empty request"):
        OtlpSink(settings).write(batch(a_span()))


def test_a_back_end_that_asks_for_a_pause_gets_it(backend: BackEnd, settings: Settings) -> None:
    backend.answers = [(429, {"Retry-After": "30"})]
    now = 100.0
    sink, one = OtlpSink(settings, clock=lambda: now), batch(a_span())
    for expected in ("answered 429", "asked for a pause; 30 s of it"):
        with pytest.raises(StoreError, match=expected):
            sink.write(one)
    assert len(backend.requests) == 1
    now = 130.0
    assert sink.write(one) == []
    assert len(backend.spans) == 1


def test_what_the_back_end_drops_is_counted(
    backend: BackEnd, settings: Settings, caplog: pytest.LogCaptureFixture
) -> None:
    backend.rejects = 2
    sink = OtlpSink(settings)
    assert sink.write(batch(a_span(), a_span())) == []
    assert sink.rejected == 2
    assert "dropped 2 spans" in caplog.text


def test_an_address_is_needed() -> None:
    with pytest.raises(ConfigError, match="OTEL_EXPORTER_OTLP_TRACES_ENDPOINT"):
        OtlpSink(load_settings())


def test_back_ends_get_the_types_of_the_conventions() -> None:
    attributes = {semconv.INPUT_TOKENS: "11", semconv.FINISH_REASONS: '["stop"]', "gen_ai.request.temperature": "none"}
    one = factories.span(factories.task(), "a", attributes=attributes, model_version="run.0.1", span_kind="Client")
    (out,) = to_otlp([one]).resource_spans[0].scope_spans[0].spans
    values = {pair.key: pair.value for pair in out.attributes}
    assert (values[semconv.INPUT_TOKENS].int_value, values["gen_ai.request.temperature"].string_value) == (11, "none")
    assert [v.string_value for v in values[semconv.FINISH_REASONS].array_value.values] == ["stop"]
    ids = [values[f"millstream.{name}"].string_value for name in ("rollout_id", "attempt_id", "model_version")]
    assert ids == [one.rollout_id, "a", "run.0.1"]
