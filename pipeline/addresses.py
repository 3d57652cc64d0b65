"""Hosts and ports of this machine."""

import ipaddress
import random
import socket
from typing import Final
from urllib.parse import urlsplit

from millstream.schemas.errors import ConfigError

LOOPBACK: Final = "127.0.0.1"
# Below the range from which systems take ports for outgoing connections.
FREE_PORTS: Final = range(20000, 32000)


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches that host."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def names_this_machine(host_header: str) -> bool:
    """Whether a request's ``Host`` is a name of this machine's own: a web page may make another name resolve to
    loopback (DNS rebinding)."""
    try:
        return is_loopback(urlsplit("//" + host_header).hostname or "")
    except ValueError:
        return False


def free_port() -> int:
    """A loopback port that nothing listens on and no outgoing connection will take."""
    for port in random.sample(FREE_PORTS, 100):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((LOOPBACK, port))
            except OSError:
                continue
            return port
    raise ConfigError(f"no free port between {FREE_PORTS.start} and {FREE_PORTS.stop}")
