"""The checkpoints of a training run: written atomically, rotated, and read without executing code."""

from __future__ import annotations

import errno
import logging
import os
import pickle
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from evit_ext._util.files import remove_unfinished, replacing

_logger = logging.getLogger(__name__)

_NAME = re.compile(r"checkpoint-(\d{9})\.pth")


class RunCheckpoints:
    """The checkpoints in a folder, named by their step, ``checkpoint-000001200.pth``.

    A checkpoint is written under another name, flushed to disk, and then renamed. Whenever the process is
    killed, the folder contains complete checkpoints only, and perhaps an unfinished one, hidden, that the
    next save removes. Files are in torch's format and contain tensors and plain Python values only, so
    reading one executes nothing.

    Args:
        folder: created with the first checkpoint if necessary.
        keep: number of checkpoints to keep, at least 1; older ones are deleted once a newer one is complete.

    Raises:
        ValueError: `keep` is less than 1.
    """

    def __init__(self, folder: str | os.PathLike[str], keep: int = 2) -> None:
        if keep < 1:
            raise ValueError(f"keep must be at least 1, got {keep}")
        self.folder = Path(folder)
        self.keep = keep

    def steps(self) -> list[int]:
        """Return the steps of the checkpoints in the folder, ascending; none if there is no folder."""
        if not self.folder.exists():
            return []
        matches = (_NAME.fullmatch(path.name) for path in self.folder.iterdir())
        return sorted(int(match[1]) for match in matches if match)

    def path(self, step: int) -> Path:
        """Return the path of the checkpoint of a step."""
        return self.folder / f"checkpoint-{step:09d}.pth"

    def save(self, state: Mapping[str, Any], step: int) -> Path:
        """Write the checkpoint of a step, and delete those that are too old.

        Raises:
            OSError: it could not be written, for lack of space for instance; older checkpoints are intact.
        """
        import torch  # here, as in load(), because it takes seconds, and steps() needs none of it

        path = self.path(step)
        self.folder.mkdir(parents=True, exist_ok=True)
        remove_unfinished(self.folder)
        try:
            with replacing(path, "wb") as file:
                torch.save(dict(state), file)
        except (OSError, RuntimeError) as error:
            # torch reports a failed write as a RuntimeError.
            cause = error if isinstance(error, OSError) else error.__context__
            said = error.strerror if isinstance(error, OSError) else error
            older = self.steps()
            left = f"that of step {older[-1]} is intact" if older else "there is none before it"
            number = cause.errno if isinstance(cause, OSError) and cause.errno else errno.EIO
            raise OSError(
                number,
                f"the checkpoint of step {step} could not be written ({said}); {left}",
                str(path),
            ) from error
        for old in self.steps()[: -self.keep]:
            self.path(old).unlink()
        return path

    def load_latest(self) -> tuple[dict[str, Any], int] | None:
        """Return the state and step of the newest complete checkpoint; None if there is none.

        Damaged ones, such as a failing disk leaves, are skipped with a warning.

        Raises:
            ValueError: all of them are damaged. (Starting again would overwrite what is left of the run.)
        """
        steps = self.steps()
        for step in reversed(steps):
            try:
                return self.load(step), step
            except ValueError as error:
                _logger.warning("%s; trying the one before it", error)
        if steps:
            raise ValueError(
                f"every checkpoint in {self.folder} is damaged: to start again, choose another folder or "
                "delete them"
            )
        return None

    def load(self, step: int) -> dict[str, Any]:
        """Return the state of a checkpoint, on the CPU.

        Raises:
            FileNotFoundError: there is none of this step.
            ValueError: it is damaged, or holds more than tensors and plain values.
        """
        import torch

        path = self.path(step)
        try:
            with zipfile.ZipFile(path) as archive:
                damaged = archive.testzip()  # compares checksums
            if damaged is not None:
                raise ValueError(f"{path} is damaged (in {damaged})")
            state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        except zipfile.BadZipFile as error:
            raise ValueError(f"{path} is not complete, or damaged") from error
        except pickle.UnpicklingError as error:
            raise ValueError(
                f"{path} is no checkpoint of a run: it holds more than tensors and plain values, and nothing "
                f"in it is executed ({error})"
            ) from error
        return state
