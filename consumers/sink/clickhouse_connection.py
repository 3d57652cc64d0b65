"""Connections to ClickHouse: embedded in this process (``chdb://``) or a server (``clickhouse://``)."""

import fcntl
import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import clickhouse_connect
from clickhouse_connect.driver.client import Client
from clickhouse_connect.driver.exceptions import ClickHouseError
from clickhouse_connect.driver.httputil import get_pool_manager
from urllib3.exceptions import HTTPError

from millstream.schemas.config.settings import Settings
from millstream.schemas.errors import ConfigError, StoreError
from millstream.schemas.folders import PRIVATE_FOLDER
from millstream.schemas.redaction import without_passwords

logger = logging.getLogger(__name__)

EMBEDDED: Final = "chdb://"
SERVER: Final = "clickhouse://"
IN_MEMORY: Final = ":memory:"
QUERY_ADDRESS: Final = "query_address"  # a file in an embedded store's folder: where its holder answers queries


def connect(settings: Settings, *, create: bool = True) -> Client:
    """A client that any thread may use, without a default database. ``create``: creates the folder of an embedded
    store if there is none, else that is an error. Raises `ConfigError`, `StoreError`."""
    dsn = settings.clickhouse_dsn
    with store_errors(settings, "can't be opened"):
        if dsn.startswith(EMBEDDED):
            return _open_embedded(embedded_path(dsn), create)
        if not dsn.startswith(SERVER):
            raise ConfigError(
                f"setting clickhouse_dsn: {address(settings)!r} begins with neither {SERVER} nor {EMBEDDED}"
            )
        return clickhouse_connect.get_client(
            dsn=dsn,
            password=settings.clickhouse_password.get_secret_value(),
            secure=settings.clickhouse_secure,
            autogenerate_session_id=False,  # a session allows one query at a time
            pool_mgr=get_pool_manager(maxsize=settings.store_connection_pool),
        )


def embedded_path(dsn: str) -> str:
    """The absolute path of an embedded store's folder, or `IN_MEMORY`."""
    path = dsn.removeprefix(EMBEDDED)
    return path if path == IN_MEMORY else str(Path(path).resolve())


def address(settings: Settings) -> str:
    """``clickhouse_dsn`` without its password."""
    return without_passwords(settings.clickhouse_dsn)


def readable(settings: Settings) -> Settings:
    """Settings to read with: an embedded store that another process holds is read from that process, if it answers
    queries (`sink --query-port`)."""
    if not settings.clickhouse_dsn.startswith(EMBEDDED) or settings.clickhouse_dsn.endswith(IN_MEMORY):
        return settings
    folder = Path(embedded_path(settings.clickhouse_dsn))
    served = folder / QUERY_ADDRESS
    if not (served.is_file() and _is_held(folder)):
        return settings
    return settings.model_copy(update={"clickhouse_dsn": f"clickhouse://{served.read_text().strip()}"})


@contextmanager
def store_errors(settings: Settings, what: str) -> Iterator[None]:
    """Raises what ClickHouse or the network reports as a `StoreError`: ``store ADDRESS WHAT: MESSAGE``."""
    try:
        yield
    except ClickHouseError as error:
        raise StoreError(without_passwords(f"store {address(settings)} {what}: {first_line(error)}")) from error


def first_line(error: Exception) -> str:
    """The message without the version and stack trace that ClickHouse adds; for a failed connection, the network's
    message."""
    if isinstance(cause := error.__cause__, HTTPError):
        message = str(getattr(cause, "reason", cause))
        return message.partition("): ")[2] or message  # after the connection's name
    return re.sub(r"\s*\(version [^)]*\)", "", str(error).strip().partition("\n")[0])


def _open_embedded(path: str, create: bool) -> Client:
    held = False
    try:
        if path != IN_MEMORY:
            if create:
                Path(path).mkdir(PRIVATE_FOLDER, parents=True, exist_ok=True)
            elif not (Path(path).is_dir() and any(Path(path).iterdir())):
                raise StoreError(
                    f"there is no store in {path}: a training run or `millstream sink` creates one; or set "
                    f"MILLSTREAM_CLICKHOUSE_DSN={EMBEDDED}FOLDER to read another one"
                )
            held = _is_held(Path(path))
            if not held:
                _remove_unfinished(Path(path))
        return clickhouse_connect.get_client(interface="chdb", path=path)
    except ImportError as error:
        raise ConfigError(
            f"setting clickhouse_dsn: an embedded store ({EMBEDDED}…) needs chDB: install millstream[embedded], or "
            f"name a server ({SERVER}user@host:8123) ({error.__cause__ or error})"
        ) from error
    except OSError as error:
        raise StoreError(f"the embedded store's folder {path} can't be created: {error.strerror}") from error
    except ClickHouseError as error:
        if "Error initializing EmbeddedServer" not in str(error):
            raise
        if not held:
            raise StoreError(f"the embedded store in {path} can't be opened: the engine wrote why to stderr") from error
        raise StoreError(
            f"the embedded store in {path} is held by another process{_holder(Path(path))}, and only one at a time can "
            "hold it. Try again when that process has ended; or, if it is a sink, start it with --query-port 8123 and "
            "read from there (MILLSTREAM_CLICKHOUSE_DSN=clickhouse://127.0.0.1:8123)"
        ) from error


def _is_held(folder: Path) -> bool:
    """Whether a process has the store open: the engine locks a file."""
    if not (status := folder / "status").is_file():
        return False
    with status.open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def _remove_unfinished(folder: Path) -> None:
    """Removes definitions that a full disk has left empty: the engine would never open the store again."""
    for definition in (folder / "metadata").rglob("*.sql"):
        if definition.stat().st_size == 0:
            logger.warning("%s is empty, probably since the disk was full: it is removed", definition)
            definition.unlink()


def _holder(folder: Path) -> str:
    """The process id that the engine has written into its folder."""
    status = folder / "status"
    found = re.search(r"PID: (\d+)", status.read_text()) if status.is_file() else None
    return f" (pid {found[1]})" if found else ""
