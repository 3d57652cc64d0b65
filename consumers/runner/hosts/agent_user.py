"""The user that agent processes run as, if it is not the runner's: it can't read the runner's files and processes."""

import os
import pwd
from dataclasses import dataclass

from millstream.schemas.errors import ConfigError


@dataclass(frozen=True, slots=True)
class AgentUser:
    """The user that agent processes run as, instead of the runner's own."""

    name: str
    uid: int
    gid: int
    home: str


def agent_user(name: str) -> AgentUser:
    """Raises `ConfigError` unless there is such a user and this process may become it."""
    try:
        found = pwd.getpwnam(name)
    except KeyError:
        raise ConfigError(f"--agent-user {name}: there is no such user on this machine") from None
    if os.geteuid() != 0:
        raise ConfigError(
            f"--agent-user {name}: only root may start processes as another user; start the runner as root, or leave "
            "--agent-user out and run the agents as the runner's own user"
        )
    if found.pw_uid == 0:
        raise ConfigError(f"--agent-user {name}: this user is root, who may read everything; name another one")
    return AgentUser(name, found.pw_uid, found.pw_gid, found.pw_dir)
