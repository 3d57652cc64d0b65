"""The deployment of a chaos run: a broker with ACLs, every role as a process with probes, a model server."""

import asyncio
import itertools
import os
import signal
import struct
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from secrets import token_hex

import aiohttp
from aiohttp import web
from confluent_kafka.admin import (
    AclBinding,
    AclBindingFilter,
    AclOperation,
    AclPermissionType,
    AdminClient,
    AlterConfigOpType,
    ConfigEntry,
    ConfigResource,
    ResourcePatternType,
    ResourceType,
)
from rich.console import Console

from millstream.consumers.log.kafka_log import KafkaLog
from millstream.deploy.kafka.local import HOST, LocalKafka, resolve_jars
from millstream.pipeline.addresses import free_port
from millstream.schemas.config.settings import load_settings
from millstream.schemas.folders import emptied_folder

ROOT = Path(__file__).parents[2]
LEASE_S = 3.0
RUNNERS, ADAPTERS = 3, 2
START_S = 90.0  # until a process has to answer probes
SILENT_S = 15.0  # without an answer to a probe, a process counts as stuck
DISK_MB = 256
USER, PASSWORD = "roles", token_hex(8)
JAAS = f'org.apache.kafka.common.security.plain.PlainLoginModule required user_{USER}="{PASSWORD}";'
console = Console()


@dataclass
class Process:
    """A role's process, and what its supervisor knows of it."""

    name: str
    arguments: tuple[str, ...]
    port: int  # of its probes
    popen: "subprocess.Popen[bytes]"
    started: float = field(default_factory=time.monotonic)
    answered: float = field(default_factory=time.monotonic)
    ready: bool = False
    frozen: bool = False
    killed: bool = False  # by the harness


class Deployment:
    """Everything that is killed, and its supervisor."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.ledger = folder / "ledger.jsonl"
        self.faults = folder / "faults"
        self.disk = folder / "disk"
        self.processes: dict[str, Process] = {}
        self.names = itertools.count(1)
        self.exits: dict[str, list[int]] = {}  # that the harness did not cause, by role
        self.stuck: list[str] = []  # processes whose probes failed; they were killed

    def up(self) -> None:
        subprocess.run(["umount", self.disk], capture_output=True, check=False)  # of a run that was killed
        emptied_folder(self.folder, "--run-dir", "the chaos harness")
        for folder in (self.folder / "log", self.faults, self.disk):
            folder.mkdir(parents=True)
        self.ledger.touch()
        options = ["-t", "tmpfs", "-o", f"size={DISK_MB}m", "tmpfs", str(self.disk)]
        self.small_disk = subprocess.run(["mount", *options], capture_output=True, check=False).returncode == 0
        plain, sasl, controller = free_port(), free_port(), free_port()
        listeners = f"PLAINTEXT://{HOST}:{plain},SASL://{HOST}:{sasl},CONTROLLER://{HOST}:{controller}"
        self.broker = LocalKafka(
            self.folder / "kafka",
            port=plain,
            properties={
                "controller.quorum.bootstrap.servers": f"{HOST}:{controller}",
                "listeners": listeners,
                "advertised.listeners": listeners,
                "listener.security.protocol.map": "PLAINTEXT:PLAINTEXT,CONTROLLER:PLAINTEXT,SASL:SASL_PLAINTEXT",
                "sasl.enabled.mechanisms": "PLAIN",
                "listener.name.sasl.plain.sasl.jaas.config": JAAS,
                "authorizer.class.name": "org.apache.kafka.metadata.authorizer.StandardAuthorizer",
                "super.users": "User:ANONYMOUS",  # the harness, and the broker itself
            },
        )
        self.broker.up()
        proxy, model = free_port(), free_port()
        variables = {
            "PROXY_URL": f"http://127.0.0.1:{proxy}",
            "PROXY_SECRET": token_hex(32),
            "MODEL_URL": f"http://127.0.0.1:{model}",
            "CLICKHOUSE_DSN": f"chdb://{self.disk / 'store'}",
            "BLOB_URL": str(self.disk / "blobs"),
            "LEASE_S": str(LEASE_S),
        }
        self.settings = load_settings(
            kafka_bootstrap_servers=f"{HOST}:{plain}", **{name.lower(): value for name, value in variables.items()}
        )
        variables |= {
            "KAFKA_BOOTSTRAP_SERVERS": f"{HOST}:{sasl}",
            "KAFKA_SECURITY_PROTOCOL": "SASL_PLAINTEXT",
            "KAFKA_SECURITY_MECHANISM": "PLAIN",
            "KAFKA_SECURITY_USERNAME": USER,
            "KAFKA_SECURITY_PASSWORD": PASSWORD,
        }
        self.environment = (
            os.environ
            | {f"MILLSTREAM_{name}": value for name, value in variables.items()}
            | {
                "COLUMNS": "200",  # of the logs
                "CHAOS_LEDGER": str(self.ledger),
                "CHAOS_FAULTS": str(self.faults),
                "PYTHONPATH": f"{Path(__file__).parent}:{os.environ.get('PYTHONPATH', '')}",
            }
        )
        asyncio.run(KafkaLog(self.settings).create_topics())
        self.admin = AdminClient({"bootstrap.servers": f"{HOST}:{plain}", "log_level": 0})
        every = [ResourceType.TOPIC, ResourceType.GROUP, ResourceType.TRANSACTIONAL_ID]
        self.permit([acl(kind, "*", AclOperation.ALL, AclPermissionType.ALLOW) for kind in every])
        threading.Thread(target=serve_model, args=(model,), daemon=True).start()
        self.start("sink", "sink")
        self.start("proxy", "proxy")
        for number in range(ADAPTERS):
            self.start(f"adapter-{number}", "adapter", "--replica", str(number))
        for _ in range(RUNNERS):
            self.add_runner()

    def start(self, name: str, *arguments: str) -> None:
        port = free_port()
        if not (clock := self.faults / f"{name}.clock").exists():
            clock.write_bytes(struct.pack("<d", 0.0))
        command = [sys.executable, str(Path(__file__).with_name("role.py")), name, *arguments]
        with (self.folder / "log" / f"{name}.log").open("ab") as log:
            popen = subprocess.Popen(
                [*command, "--health-port", str(port)],
                env=self.environment,
                cwd=ROOT,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self.processes[name] = Process(name, arguments, port, popen)

    def add_runner(self) -> None:
        options = ["--processes", "2", "--concurrency", "8", "--env", "CHAOS_LEDGER", "--drain-s", "2"]
        self.start(f"runner-{next(self.names)}", "runner", "chaos_agent:agent", *options)

    def of(self, role: str) -> list[Process]:
        """The processes of a role that run and are not frozen."""
        return [p for p in self.processes.values() if p.name.split("-")[0] == role and not p.frozen]

    def kill(self, process: Process) -> None:
        process.killed = True
        process.popen.kill()

    def freeze(self, process: Process) -> None:
        process.frozen = True
        process.popen.send_signal(signal.SIGSTOP)

    def thaw(self, process: Process) -> None:
        process.frozen, process.answered = False, time.monotonic()
        if process.popen.poll() is None:
            process.popen.send_signal(signal.SIGCONT)

    def set_clock(self, process: Process, offset_s: float) -> None:
        with (self.faults / f"{process.name}.clock").open("r+b") as file:
            file.write(struct.pack("<d", offset_s))

    # The supervisor

    def revive(self) -> None:
        """Starts again whatever has ended."""
        for process in list(self.processes.values()):
            if (code := process.popen.poll()) is not None:
                if not process.killed:
                    self.exits.setdefault(process.name.split("-")[0], []).append(code)
                self.start(process.name, *process.arguments)

    async def supervise(self) -> None:
        """Kills processes that say they are stuck, or don't answer. Ends by being cancelled."""
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(5.0)) as session:
            while True:
                await asyncio.sleep(1.0)
                await asyncio.gather(*(self._probe(session, p) for p in self.processes.values() if not p.frozen))

    async def _probe(self, session: aiohttp.ClientSession, process: Process) -> None:
        url, now = f"http://127.0.0.1:{process.port}", time.monotonic()
        try:
            async with session.get(f"{url}/livez") as live, session.get(f"{url}/readyz") as ready:
                process.ready = ready.status == 200
                if live.status == 200:
                    process.answered = now
                why = (await live.text()).replace("\n", ", ")
        except (aiohttp.ClientError, TimeoutError) as error:
            process.ready, why = False, repr(error)
        limit_s = SILENT_S if process.answered > process.started else START_S
        running = process.popen.poll() is None and not process.frozen and self.processes.get(process.name) is process
        if running and now - process.answered > limit_s:
            self.stuck.append(f"{process.name}: {why}")
            console.print(f"         {process.name} is stuck: {why}")
            self.kill(process)

    async def all_ready(self, timeout_s: float) -> list[str]:
        """Waits until every process is ready; returns the names of those that are not."""
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline and not all(p.ready for p in self.processes.values()):
            await asyncio.sleep(0.5)
            self.revive()
        return [p.name for p in self.processes.values() if not p.ready]

    def down(self) -> None:
        for process in self.processes.values():
            process.popen.terminate()
            process.popen.send_signal(signal.SIGCONT)
        for process in self.processes.values():
            try:
                process.popen.wait(60)
            except subprocess.TimeoutExpired:
                self.stuck.append(f"{process.name} did not end within 60 s of SIGTERM")
                process.popen.kill()
                process.popen.wait()
        self.processes.clear()

    def close(self) -> None:
        """Keeps the logs and the broker's data, not the store's if it is on the small disk."""
        self.down()
        self.broker.down()
        if self.small_disk:
            subprocess.run(["umount", self.disk], capture_output=True, check=False)

    # The brokers

    def permit(self, acls: list[AclBinding]) -> None:
        for created in self.admin.create_acls(acls).values():
            created.result(10)

    def unpermit(self, acl: AclBinding) -> None:
        fields = acl.restype, acl.name, acl.resource_pattern_type, acl.principal, acl.host
        same = AclBindingFilter(*fields, acl.operation, acl.permission_type)
        for deleted in self.admin.delete_acls([same]).values():
            deleted.result(10)

    def limit_topic(self, topic: str, size: int) -> None:
        entry = ConfigEntry("max.message.bytes", str(size), incremental_operation=AlterConfigOpType.SET)
        resource = ConfigResource(ResourceType.TOPIC, topic, incremental_configs=[entry])
        for altered in self.admin.incremental_alter_configs([resource]).values():
            altered.result(10)

    def throttle(self, bytes_per_s: int | None) -> None:
        """Limits what the roles send and fetch, all together."""
        names = "producer_byte_rate", "consumer_byte_rate"
        change = ["--delete-config", ",".join(names)]
        if bytes_per_s is not None:
            change = ["--add-config", ",".join(f"{name}={bytes_per_s}" for name in names)]
        options = ["-XX:TieredStopAtLevel=1", "-cp", str(resolve_jars() / "*"), "kafka.admin.ConfigCommand"]
        where = ["--bootstrap-server", self.settings.kafka_bootstrap_servers, "--entity-type", "users"]
        subprocess.run(
            ["java", *options, *where, "--entity-name", USER, "--alter", *change],
            check=True,
            capture_output=True,
            timeout=60,
        )


def acl(kind: ResourceType, name: str, operation: AclOperation, permission: AclPermissionType) -> AclBinding:
    """For the roles, from every host."""
    return AclBinding(kind, name, ResourcePatternType.LITERAL, f"User:{USER}", "*", operation, permission)


def serve_model(port: int) -> None:
    """A model server in vLLM's form; its answers are one token."""

    async def chat(request: web.Request) -> web.Response:
        body = await request.json()
        choice = {
            "index": 0,
            "message": {"role": "assistant", "content": "ok"},
            "finish_reason": "length",
            "token_ids": [1],
            "logprobs": {"content": [{"token": "ok", "logprob": -0.1}]},
        }
        return web.json_response(
            {
                "id": f"chatcmpl-{token_hex(12)}",
                "object": "chat.completion",
                "created": 0,
                "model": body["model"],
                "prompt_token_ids": [1, 2],
                "choices": [choice],
                "usage": {"prompt_tokens": 2, "completion_tokens": 1, "total_tokens": 3},
            }
        )

    async def serve() -> None:
        app = web.Application(client_max_size=64 << 20)
        app.router.add_post("/v1/chat/completions", chat)
        runner = web.AppRunner(app)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", port).start()
        await asyncio.Event().wait()

    asyncio.run(serve())
