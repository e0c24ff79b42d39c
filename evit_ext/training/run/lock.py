"""One run in a folder at a time."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
from pathlib import Path

from evit_ext.training.ranks import Ranks

_logger = logging.getLogger(__name__)


class FolderLock:
    """Locks a folder for the processes of one run, until the first of them ends.

    Without it, a job that a scheduler restarts while the old one is still ending would write the same files.
    The operating system releases the lock when the process ends, for whatever reason; child processes do not
    inherit it.

    Args:
        folder: created if necessary.
        ranks: the processes; the first one holds the lock.

    Raises:
        ValueError: another run uses the folder; raised on all processes.
        OSError: the folder cannot be created or written to.
    """

    def __init__(self, folder: Path, ranks: Ranks) -> None:
        self._file: int | None = None
        self._path = folder / "lock"
        #: Folders that were created, the innermost first.
        self._made: list[Path] = []
        taken = False
        if ranks.is_first:
            if folder.exists() and not folder.is_dir():
                raise NotADirectoryError(errno.ENOTDIR, "is a file, expected a run's folder", str(folder))
            self._made = [path for path in (folder, *folder.parents) if not path.exists()]
            folder.mkdir(parents=True, exist_ok=True)
            self._file = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o644)
            taken = not self._lock()
        try:
            (anywhere,) = ranks.sum([taken])
        except BaseException:
            self.discard()
            raise
        if anywhere:
            self.release()
            raise ValueError(f"another run is using {folder}: wait until it ends, or choose another folder")

    def _lock(self) -> bool:
        """Try to lock the file; return whether this process has it."""
        assert self._file is not None
        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                return False
            # Some network file systems have no locks.
            folder = self._path.parent
            _logger.warning("%s cannot be locked (%s): make sure that no other run uses it", folder, error)
            return True
        # Another process may have deleted the file, see discard(), after this one had opened it.
        return self._path.exists() and os.path.samestat(os.fstat(self._file), self._path.stat())

    def discard(self) -> None:
        """Release the folder, and delete it and its parents if this lock created them and they are empty."""
        if self._file is not None and self._made:
            with contextlib.suppress(OSError):
                if os.listdir(self._path.parent) == [self._path.name]:
                    self._path.unlink()
                for folder in self._made:
                    folder.rmdir()
        self.release()

    def release(self) -> None:
        """Release the folder."""
        if self._file is not None:
            os.close(self._file)
            self._file = None
