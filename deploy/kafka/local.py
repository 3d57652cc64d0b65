"""A single-node Apache Kafka on this machine, for laptops and tests: downloaded with Maven, run with Java.

A folder is a broker: its configuration, its log (``broker.log``; ``broker.log.1`` from the previous start), its process
id and its data. It restarts with the same data and port, also after a kill -9.
"""

import base64
import hashlib
import json
import logging
import os
import random
import shutil
import signal
import socket
import subprocess
import tempfile
import time
import uuid
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from confluent_kafka import KafkaException
from confluent_kafka.admin import AdminClient

from millstream.schemas.errors import ConfigError
from millstream.schemas.folders import own_folder

logger = logging.getLogger(__name__)

HOST = "127.0.0.1"
# Below the range from which systems take ports for outgoing connections: a client that keeps calling a stopped broker
# in that range can end up connected to itself, and then holds the broker's port.
FREE_PORTS = range(20000, 32000)
HEAP = "-Xmx512m"
STOP_S = 20.0  # a graceful stop takes 1–2 s; after this the process is killed
LARGEST_RECORD = 64 << 20  # the topics set their own, lower limit

CONFIG = """\
node.id=1
process.roles=broker,controller
controller.quorum.bootstrap.servers={host}:{controller_port}
controller.listener.names=CONTROLLER
listeners=PLAINTEXT://{host}:{port},CONTROLLER://{host}:{controller_port}
advertised.listeners=PLAINTEXT://{host}:{port},CONTROLLER://{host}:{controller_port}
listener.security.protocol.map=PLAINTEXT:PLAINTEXT,CONTROLLER:PLAINTEXT
log.dirs={data}

# One node: internal topics are small and unreplicated.
offsets.topic.num.partitions=4
offsets.topic.replication.factor=1
transaction.state.log.num.partitions=4
transaction.state.log.replication.factor=1
transaction.state.log.min.isr=1
share.coordinator.state.topic.num.partitions=1
share.coordinator.state.topic.replication.factor=1
share.coordinator.state.topic.min.isr=1
auto.create.topics.enable=false

# A killed broker waits at its restart until its old session has expired: 3 s instead of 9.
broker.session.timeout.ms=3000
broker.heartbeat.interval.ms=500
# A frozen transactional producer delays the readers of its partitions this much longer than its time-out.
transaction.abort.timed.out.transaction.cleanup.interval.ms=1000

# Dead members are noticed within seconds; groups form at once.
group.initial.rebalance.delay.ms=0
group.min.session.timeout.ms=1000
group.consumer.min.session.timeout.ms=1000
group.consumer.session.timeout.ms=6000
group.consumer.min.heartbeat.interval.ms=100
group.consumer.heartbeat.interval.ms=1000

message.max.bytes={largest}
replica.fetch.max.bytes={largest}

# A laptop's share of memory and threads.
num.network.threads=2
num.io.threads=4
background.threads=4
log.cleaner.dedupe.buffer.size=16777216
"""


@dataclass(frozen=True, slots=True)
class BrokerStatus:
    """A running broker."""

    pid: int
    bootstrap_servers: str
    uptime_s: float
    folder: str
    log: str


@dataclass(frozen=True, slots=True)
class _Process:
    pid: int
    port: int
    controller_port: int
    started: float  # seconds since the epoch


def missing_tools() -> list[str]:
    """The missing programs that a local Kafka needs."""
    return [name for name, path in (("java (17 or newer)", _java()), ("mvn (Maven)", shutil.which("mvn"))) if not path]


class LocalKafka:
    """A broker in a folder. Any process may start, query or stop it; it outlives the process that started it."""

    def __init__(
        self, folder: Path | str = "runs/kafka", *, port: int = 9092, properties: Mapping[str, str] | None = None
    ) -> None:
        """``port`` 0: a free port, or the previous one of this folder's broker. ``properties`` override those above."""
        self.folder = Path(folder).absolute()
        self.log = self.folder / "broker.log"
        self._wanted_port = port
        self._properties = dict(properties or {})
        self._child: subprocess.Popen[bytes] | None = None

    @property
    def bootstrap_servers(self) -> str:
        """host:port, also while the broker is down. Raises `ConfigError` if it was never started."""
        last = self._last()
        if last is None:
            raise ConfigError(f"no Kafka was ever started in {self.folder}: run `millstream kafka up`")
        return f"{HOST}:{last.port}"

    def status(self) -> BrokerStatus | None:
        """The running broker, or None."""
        last = self._last()
        if last is None or not self._alive(last.pid):
            return None
        return BrokerStatus(
            last.pid, f"{HOST}:{last.port}", time.time() - last.started, str(self.folder), str(self.log)
        )

    def up(self, timeout_s: float = 60.0) -> BrokerStatus:
        """Starts the broker unless it is running, and waits until it answers.

        Raises `ConfigError` if Java or Maven are missing, the folder holds other files, the port is taken, or the
        broker dies or does not answer in time (with the last lines of its log).
        """
        running = self.status()
        if running is not None:
            return running
        if self._last() is None:  # its first start here
            own_folder(self.folder, "--data-dir", "a local Kafka broker")
        java = _java()
        if java is None:
            raise ConfigError("a local Kafka needs Java 17 or newer: install it (java on PATH, or JAVA_HOME)")
        jars = resolve_jars()
        last = self._last()
        port = self._wanted_port or (last.port if last is not None and _is_free(last.port) else _free_port())
        if not _is_free(port):
            raise ConfigError(f"port {port} is in use by another program: stop it, or choose another port (--port)")
        controller_port = last.controller_port if last is not None and _is_free(last.controller_port) else _free_port()
        config = self._write_config(port, controller_port)
        classpath = [java, HEAP, "-XX:TieredStopAtLevel=1", "-XX:+UseSerialGC", *_LOGGING]
        classpath += ["-cp", str(jars / "*")]
        if self.log.exists():
            self.log.replace(self.log.with_suffix(".log.1"))
        with self.log.open("wb") as log:
            if not (self.folder / "data" / "meta.properties").exists():
                self._format(classpath, config, log)
            self._child = subprocess.Popen(
                [*classpath, "kafka.Kafka", str(config)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C in the terminal must not stop the broker
            )
        started = _Process(self._child.pid, port, controller_port, time.time())
        self._state_file.write_text(json.dumps(asdict(started)))
        self._wait_until_it_answers(started, timeout_s)
        status = self.status()
        if status is None:
            raise ConfigError(f"Kafka died right after its start\n{self._tail()}")
        return status

    def down(self) -> bool:
        """Stops the broker gracefully, after 20 s by force; returns whether there was one. Its data stays."""
        return self._stop(signal.SIGTERM)

    def kill(self) -> bool:
        """Kills the broker with SIGKILL; returns whether there was one."""
        return self._stop(signal.SIGKILL)

    def _stop(self, first: signal.Signals) -> bool:
        last = self._last()
        if last is None or not self._alive(last.pid):
            return False
        for sign in (first, signal.SIGKILL):
            try:
                os.kill(last.pid, sign)
            except ProcessLookupError:
                return True
            deadline = time.monotonic() + STOP_S
            while time.monotonic() < deadline:
                if not self._alive(last.pid):
                    return True
                time.sleep(0.05)
        raise ConfigError(f"Kafka (process {last.pid}) could not be stopped")

    @property
    def _state_file(self) -> Path:
        return self.folder / "broker.json"

    def _last(self) -> _Process | None:
        try:
            return _Process(**json.loads(self._state_file.read_text()))
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (OSError, ValueError, TypeError) as error:
            raise ConfigError(f"{self._state_file} can't be read ({error}): stop that Kafka and delete it") from error

    def _alive(self, pid: int) -> bool:
        """Whether the process is still this folder's broker: process ids are reused."""
        if self._child is not None and self._child.pid == pid:
            return self._child.poll() is None
        return _runs(pid, str(self._config_file))

    @property
    def _config_file(self) -> Path:
        return self.folder / "server.properties"

    def _write_config(self, port: int, controller_port: int) -> Path:
        data = self.folder / "data"
        values: dict[str, Any] = {"host": HOST, "port": port, "controller_port": controller_port}
        own = "".join(f"{name}={value}\n" for name, value in self._properties.items())  # the last value counts
        self._config_file.write_text(CONFIG.format(**values, data=data, largest=LARGEST_RECORD) + own)
        return self._config_file

    def _format(self, classpath: list[str], config: Path, log: Any) -> None:
        cluster = "M" + base64.urlsafe_b64encode(uuid.uuid4().bytes).decode()[1:22]  # never a leading dash
        command = [*classpath, "kafka.tools.StorageTool", "format", "-t", cluster, "-c", str(config), "--standalone"]
        if subprocess.run(command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT).returncode:
            raise ConfigError(f"Kafka could not format {self.folder / 'data'}\n{self._tail()}")

    def _wait_until_it_answers(self, broker: _Process, timeout_s: float) -> None:
        deadline = time.monotonic() + timeout_s
        quiet: dict[str, Any] = {
            "bootstrap.servers": f"{HOST}:{broker.port}",
            "log_level": 0,
            "error_cb": lambda _: None,
        }
        while time.monotonic() < deadline:
            if not self._alive(broker.pid):
                raise ConfigError(f"Kafka ended while it started; the end of {self.log}:\n{self._tail()}")
            if not _listens(broker.port):
                time.sleep(0.05)
                continue
            try:
                there = AdminClient(quiet).list_topics(timeout=2)
                leaders = [p.leader for topic in there.topics.values() for p in topic.partitions.values()]
                if there.brokers and -1 not in leaders:
                    return
            except KafkaException as error:
                logger.debug("not yet: %s", error)
            time.sleep(0.05)
        tail = self._tail()
        self.kill()
        raise ConfigError(f"Kafka did not answer within {timeout_s:.0f} s; the end of {self.log}:\n{tail}")

    def _tail(self, lines: int = 15) -> str:
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])


_LOGGING = (
    "-Dorg.slf4j.simpleLogger.logFile=System.out",
    "-Dorg.slf4j.simpleLogger.showDateTime=true",
    "-Dorg.slf4j.simpleLogger.dateTimeFormat=yyyy-MM-dd HH:mm:ss.SSS",
    "-Dorg.slf4j.simpleLogger.showThreadName=false",
    "-Dorg.slf4j.simpleLogger.showShortLogName=true",
)


def resolve_jars() -> Path:
    """The folder of Kafka's jars in the user's cache; the first call downloads them with Maven (43 MB).

    Raises `ConfigError` if Maven is missing or can't reach its repository.
    """
    pom = files(__package__).joinpath("pom.xml").read_bytes()
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "millstream"
    jars = cache / f"kafka-{hashlib.sha256(pom).hexdigest()[:12]}"
    if jars.is_dir():
        return jars
    maven = shutil.which("mvn")
    if maven is None:
        raise ConfigError("a local Kafka needs Maven, once, to download it: install it (mvn on PATH)")
    logger.info("downloading Kafka with Maven into %s (once)", jars)
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as folder:
        (Path(folder) / "pom.xml").write_bytes(pom)
        command = [maven, "-B", "-q", "dependency:copy-dependencies", f"-DoutputDirectory={folder}/jars"]
        done = subprocess.run(command, cwd=folder, stdin=subprocess.DEVNULL, capture_output=True, text=True)
        if done.returncode:
            tail = "\n".join((done.stdout + done.stderr).splitlines()[-10:])
            raise ConfigError(f"Maven could not download Kafka; is its repository reachable?\n{tail}")
        try:
            (Path(folder) / "jars").rename(jars)  # atomic, also if another process does the same
        except OSError:
            if not jars.is_dir():
                raise
    return jars


def _java() -> str | None:
    home = os.environ.get("JAVA_HOME")
    return (home and shutil.which("java", path=f"{home}/bin")) or shutil.which("java")


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError:
            return False
    return True


def _free_port() -> int:
    """A free port of this machine, outside the range of outgoing connections."""
    for port in random.sample(FREE_PORTS, 100):
        if _is_free(port):
            return port
    raise ConfigError(f"there is no free port between {FREE_PORTS.start} and {FREE_PORTS.stop}")


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(1)
        return probe.connect_ex((HOST, port)) == 0


def _runs(pid: int, argument: str) -> bool:
    """Whether a process with that argument is running; a zombie is not."""
    if not Path("/proc/self/stat").exists():
        shown = subprocess.run(
            ["ps", "-ww", "-o", "stat=,args=", "-p", str(pid)], capture_output=True, text=True
        ).stdout
        return argument in shown and not shown.startswith("Z")
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        arguments = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace")
    except OSError:
        return False
    state, threads = fields[0], int(fields[17])
    if state in "ZX" and threads <= 1:  # with more threads, only the first has ended
        return False
    return argument in arguments or not arguments  # a process that is ending has no arguments
