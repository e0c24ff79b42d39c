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
    """Keeps a folder for the processes of one run, for as long as the first of them lives.

    A scheduler that starts a job again while the old one still ends would otherwise have both write the same
    files. The system gives the lock back when the process ends, however it does; children do not inherit it.

    Args:
        folder: made if it is not there.
        ranks: the processes; the first one holds the lock.

    Raises:
        ValueError: another run has the folder; on all processes.
        OSError: the folder cannot be made or written to.
    """

    def __init__(self, folder: Path, ranks: Ranks) -> None:
        self._file: int | None = None
        self._path = folder / "lock"
        #: Folders that were made for it, the innermost first.
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
            raise ValueError(
                f"another run is at work in {folder}: wait for its end, or choose another folder"
            )

    def _lock(self) -> bool:
        """Return whether the file is this process' now."""
        assert self._file is not None
        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                return False
            # Some network file systems have no locks.
            folder = self._path.parent
            _logger.warning("%s cannot be locked (%s): see that no other run uses it", folder, error)
            return True
        # Another one may have taken the file away, see discard(), after this one had opened it.
        return self._path.exists() and os.path.samestat(os.fstat(self._file), self._path.stat())

    def discard(self) -> None:
        """Let the folder go, and take away what was made for it, unless something else is in it."""
        if self._file is not None and self._made:
            with contextlib.suppress(OSError):
                if os.listdir(self._path.parent) == [self._path.name]:
                    self._path.unlink()
                for folder in self._made:
                    folder.rmdir()
        self.release()

    def release(self) -> None:
        """Let the folder go."""
        if self._file is not None:
            os.close(self._file)
            self._file = None
