"""Runs the commands of a step, with their output in a log."""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import subprocess
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path


class StepError(Exception):
    """A step that failed; says what, in one line."""


def run(
    command: Sequence[str | Path],
    log: Path,
    *,
    cwd: Path | None = None,
    environment: Mapping[str, str] | None = None,
) -> str:
    """Run a command; returns what it printed, which is also appended to `log`.

    Raises:
        StepError: it cannot be run or its exit status is not 0; with the last line that it printed.
    """
    words = [str(word) for word in command]
    try:
        done = subprocess.run(
            words,
            cwd=cwd,
            env={**os.environ, **(environment or {})},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        )
    except OSError as error:
        raise StepError(f"{words[0]} cannot be run: {error}") from error
    with log.open("a") as file:
        file.write(f"$ {shlex.join(words)}\n{done.stdout}\n")
    if done.returncode != 0:
        raise StepError(f"{telling_line(done.stdout) or f'exit status {done.returncode}'} ({log.name})")
    return done.stdout


def describe(error: Exception, log: Path) -> str:
    """What an error says, in one line; the traceback of one that no step foresaw goes into `log`."""
    if isinstance(error, StepError):
        return str(error)
    with contextlib.suppress(OSError), log.open("a") as file:  # the disk may be full
        traceback.print_exception(type(error), error, error.__traceback__, file=file)
    said = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {said} ({log.name})"


def telling_line(output: str) -> str:
    """The line that says why: setup.py's, else the compiler's first error, else the last that names one."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    own = [line for line in lines if line.startswith("evit_ext: error: ")]
    compiler = [line for line in lines if re.search(r":\d+:\d+: (?:fatal )?error: |\(\d+\): error: ", line)]
    errors = [line for line in lines if "rror" in line]
    return (own or compiler[:1] or errors or lines or [""])[-1]
