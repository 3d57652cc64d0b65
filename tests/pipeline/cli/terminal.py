"""Runs a command whose stderr is a terminal."""

import os
import pty
import re
import subprocess
from pathlib import Path
from typing import IO

ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


def on_a_terminal(command: list[str], folder: Path, stdout: IO[str] | None = None, **variables: str) -> str:
    """What the command has shown there, without its escape sequences. Asserts that it succeeds. ``stdout``: by default
    the terminal, too."""
    ours, theirs = pty.openpty()
    environment = os.environ | {"TERM": "xterm", "COLUMNS": "120"} | variables
    with subprocess.Popen(command, cwd=folder, env=environment, stdout=stdout or theirs, stderr=theirs) as process:
        os.close(theirs)
        shown = b""
        try:
            while part := os.read(ours, 65536):
                shown += part
        except OSError:  # EIO: nobody has the terminal open any more
            pass
    os.close(ours)
    text = ESCAPES.sub("", shown.decode())
    assert process.returncode == 0, text
    return text
