"""One run in a folder at a time."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
from pathlib import Path

from evit_ext.training.ranks import Ranks

_logger = logging.getLogger(__name__)


class FolderLock:
    """Keeps a folder for the processes of one run, for as long as the first of them lives.

    A scheduler that starts a job again while the old one still ends would otherwise have both write the same
    files. The system gives the lock back when the process ends, however it does; children do not inherit it.

    Args:
        folder: made if it is not there.
        ranks: the processes; the first one holds the lock.

    Raises:
        ValueError: another run has the folder; on all processes.
    """

    def __init__(self, folder: Path, ranks: Ranks) -> None:
        self._file: int | None = None
        taken = False
        if ranks.is_first:
            folder.mkdir(parents=True, exist_ok=True)
            self._file = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o644)
            try:
                fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                taken = error.errno in (errno.EACCES, errno.EAGAIN)
                if not taken:  # some network file systems have none
                    _logger.warning("%s cannot be locked (%s): see that no other run uses it", folder, error)
        (anywhere,) = ranks.sum([taken])
        if anywhere:
            self.release()
            raise ValueError(
                f"another run is at work in {folder}: wait for its end, or choose another folder"
            )

    def release(self) -> None:
        """Let the folder go."""
        if self._file is not None:
            os.close(self._file)
            self._file = None
