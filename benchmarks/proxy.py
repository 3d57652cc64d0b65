"""What the proxy costs: CPU per request and latency, compared with a direct call and a bare aiohttp pass-through.

The upstream answers at once with a fixed completion of 16 tokens in vLLM's form (ids and log-probabilities). The
pass-through reads the request, posts it on, and returns the answer: the cost of any proxy on aiohttp. Ours checks
the key, asks for tokens, writes a span to a real Kafka and waits for its acknowledgement. Each is a separate
process; they are measured in turns, so that noise affects all alike. CPU is that of the proxy's process, all threads.

    python benchmarks/proxy.py [--quick] [--json FILE]
"""

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from socket import create_connection
from typing import Any

import aiohttp
from aiohttp import web

from millstream.deploy.kafka.local import LocalKafka
from millstream.pipeline.addresses import free_port
from millstream.schemas.attempt_keys import attempt_key, attempt_path
from millstream.schemas.ids import new_id

SECRET = "benchmark" * 4
TOKENS = 16
AT_ONCE = (8, 32, 128)  # clients
USUAL = 32  # of them, for the figures without a number
STREAMS = 500
TICKS = os.sysconf("SC_CLK_TCK")
BODY = {"model": "policy", "messages": [{"role": "user", "content": "question " * 20}], "temperature": 1.0}


def completion() -> dict[str, Any]:
    word = {"token": " word", "logprob": -0.125, "bytes": [32, 119], "top_logprobs": []}
    choice = {
        "index": 0,
        "message": {"role": "assistant", "content": "word " * TOKENS},
        "finish_reason": "stop",
        "logprobs": {"content": [word] * TOKENS},
        "token_ids": list(range(TOKENS)),
    }
    usage = {"prompt_tokens": 32, "completion_tokens": TOKENS, "total_tokens": 32 + TOKENS}
    head = {"id": "chatcmpl-1", "object": "chat.completion", "created": 1, "model": "policy"}
    return head | {"choices": [choice], "usage": usage, "prompt_token_ids": list(range(32))}


async def upstream(port: int) -> None:
    answer = json.dumps(completion()).encode()
    head = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1, "model": "policy"}

    async def chat(request: web.Request) -> web.StreamResponse:
        body = await request.json()
        if not body.get("stream"):
            return web.Response(body=answer, content_type="application/json", headers={"x-model-version": "run.0.1"})
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        for number in range(TOKENS):
            word = {"token": " word", "logprob": -0.125, "bytes": [32], "top_logprobs": []}
            choice = {"index": 0, "delta": {"content": " word"}, "token_ids": [number], "logprobs": {"content": [word]}}
            await response.write(f"data: {json.dumps({**head, 'choices': [choice]})}\n\n".encode())
            await asyncio.sleep(0.05)
        end = {**head, "choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]}
        await response.write(f"data: {json.dumps(end)}\n\ndata: [DONE]\n\n".encode())
        return response

    app = web.Application()
    app.add_routes([web.post("/v1/chat/completions", chat)])
    await _forever(app, port)


async def passthrough(port: int, target: str) -> None:
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:

        async def chat(request: web.Request) -> web.Response:
            async with session.post(target, data=await request.read(), headers=JSON) as answer:
                return web.Response(body=await answer.read(), content_type="application/json")

        app = web.Application()
        app.add_routes([web.post("/{rest:.*}", chat)])
        await _forever(app, port)


async def _forever(app: web.Application, port: int) -> None:
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", port).start()
    await asyncio.Event().wait()


JSON = {"Content-Type": "application/json"}


class Front:
    """A server process, and a URL with headers for each client."""

    def __init__(self, process: subprocess.Popen[bytes], *clients: tuple[str, dict[str, str]]) -> None:
        self.process, self.clients = process, clients

    def cpu_s(self) -> float:
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / TICKS

    def rss_mb(self) -> float:
        return rss_mb(self.process.pid)


def rss_mb(pid: int | str = "self") -> float:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / (1 << 20)


async def ask(front: Front, count: int, at_once: int) -> list[float]:
    """Milliseconds that each call took."""
    body, took = json.dumps(BODY).encode(), []
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:

        async def one_after_another(client: int) -> None:
            url, headers = front.clients[client % len(front.clients)]
            for _ in range(count // at_once):
                began = time.perf_counter()
                async with session.post(url, data=body, headers=headers) as answer:
                    await answer.read()
                    assert answer.status == 200, await answer.text()
                took.append((time.perf_counter() - began) * 1000)

        await asyncio.gather(*(one_after_another(client) for client in range(at_once)))
    return took


async def stream(front: Front, count: int) -> tuple[float, float]:
    """``count`` streams at once: seconds until all were complete; CPU milliseconds per stream in the process."""
    body = json.dumps(BODY | {"stream": True}).encode()
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:

        async def one(client: int) -> None:
            url, headers = front.clients[client % len(front.clients)]
            async with session.post(url, data=body, headers=headers) as answer:
                text = await answer.read()
                assert text.endswith(b"data: [DONE]\n\n"), text[-200:]
                assert text.count(b" word") == TOKENS

        began, cpu = time.perf_counter(), front.cpu_s()
        await asyncio.gather(*map(one, range(count)))
        return time.perf_counter() - began, (front.cpu_s() - cpu) / count * 1000


@contextmanager
def fronts(folder: Path) -> Iterator[dict[str, Front]]:
    with ExitStack() as stack:
        broker = LocalKafka(folder / "kafka", port=0)
        broker.up()
        stack.callback(broker.down)
        ports = [free_port() for _ in range(3)]
        urls = [f"http://127.0.0.1:{port}" for port in ports]
        target = f"{urls[0]}/v1/chat/completions"
        env = os.environ | {
            "MILLSTREAM_KAFKA_BOOTSTRAP_SERVERS": broker.bootstrap_servers,
            "MILLSTREAM_PROXY_SECRET": SECRET,
            "MILLSTREAM_PROXY_URL": urls[2],
            "MILLSTREAM_MODEL_URL": urls[0],
        }
        subprocess.run([sys.executable, "-m", "millstream.pipeline", "topics", "create"], env=env, check=True)
        me = [sys.executable, __file__, "--role"]
        commands = [
            [*me, "upstream", str(ports[0])],
            [*me, "passthrough", str(ports[1]), target],
            [sys.executable, "-m", "millstream.pipeline", "proxy"],
        ]
        processes = []
        for command, port in zip(commands, ports, strict=True):
            process = subprocess.Popen(command, env=env)
            stack.callback(process.wait)
            stack.callback(process.terminate)
            _wait(port)
            processes.append(process)
        yield {
            "direct": Front(processes[0], (target, JSON)),
            "passthrough": Front(processes[1], (urls[1] + "/v1/chat/completions", JSON)),
            "millstream": Front(processes[2], *(_attempt(urls[2]) for _ in range(max(AT_ONCE)))),
        }


def _attempt(proxy: str) -> tuple[str, dict[str, str]]:
    rollout, attempt = new_id(), new_id()
    key = attempt_key(SECRET, rollout, attempt, valid_s=3600)
    url = f"{proxy}{attempt_path(rollout, attempt)}/v1/chat/completions"
    return url, JSON | {"Authorization": f"Bearer {key}"}


def _wait(port: int) -> None:
    for _ in range(300):
        try:
            create_connection(("127.0.0.1", port), 1.0).close()
        except OSError:
            time.sleep(0.1)
        else:
            return
    raise TimeoutError(f"nothing listens on port {port}")


def measure(quick: bool) -> dict[str, float]:
    rounds, count = (1, 512) if quick else (7, 2048)
    with tempfile.TemporaryDirectory() as folder, fronts(Path(folder)) as found:
        cpu: dict[tuple[str, int], list[float]] = {(name, at): [] for name in found for at in AT_ONCE}
        took: dict[str, list[float]] = {name: [] for name in found}
        for number in range(rounds + 1):
            for at_once in AT_ONCE:
                for name, front in found.items():
                    before = front.cpu_s()
                    asyncio.run(ask(front, count, at_once))
                    if number:  # the first one warms up
                        cpu[name, at_once].append((front.cpu_s() - before) / count * 1000)
            for name, front in found.items():
                single = asyncio.run(ask(front, count // 8, 1))
                if number:
                    took[name].append(statistics.median(single))
        ours = found["millstream"]
        idle = ours.rss_mb()
        seconds, per_stream = asyncio.run(stream(ours, 100 if quick else STREAMS))
        full = ours.rss_mb()
    p50 = {name: statistics.median(values) for name, values in took.items()}
    ratios = {
        at: statistics.median(a / b for a, b in zip(cpu["millstream", at], cpu["passthrough", at], strict=True))
        for at in AT_ONCE
    }
    return {
        "cpu_ms_per_request": round(statistics.median(cpu["millstream", USUAL]), 3),
        "passthrough_cpu_ms_per_request": round(statistics.median(cpu["passthrough", USUAL]), 3),
        "cpu_ratio": round(ratios[USUAL], 2),
        **{f"cpu_ratio_at_{at}": round(ratio, 2) for at, ratio in ratios.items()},
        "direct_p50_ms": round(p50["direct"], 2),
        "passthrough_added_p50_ms": round(p50["passthrough"] - p50["direct"], 2),
        "added_p50_ms": round(p50["millstream"] - p50["direct"], 2),
        "streams_at_once": 100 if quick else STREAMS,
        "streams_s": round(seconds, 2),
        "cpu_ms_per_stream": round(per_stream, 2),
        "rss_idle_mb": round(idle),
        "rss_after_streams_mb": round(full),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--role", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.role:
        role, port, *rest = options.role
        asyncio.run(upstream(int(port)) if role == "upstream" else passthrough(int(port), *rest))
        return
    found = measure(options.quick)
    width = max(map(len, found))
    for name, value in found.items():
        print(f"{name.ljust(width)}  {value:>8}")
    if options.json:
        options.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
