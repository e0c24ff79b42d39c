"""Images that could not be read: reported with their path, counted over all processes, up to a limit."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping
from pathlib import Path

from evit_ext._util.files import replacing
from evit_ext.training.ranks import Ranks

# So many unreadable images are named at once.
_ANNOUNCED = 3


class TooManyUnreadable(Exception):
    """More images than allowed could not be read."""


class UnreadableImages:
    """The images that could not be read, each counted once.

    The first process writes them to ``unreadable.csv`` (path, reason) as they are found, after :meth:`begin`.

    Args:
        folder: of the run.
        ranks: the processes.
        limit: largest number that is allowed.
    """

    def __init__(self, folder: Path, ranks: Ranks, limit: int) -> None:
        self.path = folder / "unreadable.csv"
        self._ranks = ranks
        self._limit = limit
        self._reasons: dict[str, str] = {}
        self._new: list[tuple[str, str]] = []

    def __len__(self) -> int:
        return len(self._reasons)

    def add(self, images: Iterable[tuple[str, str]]) -> None:
        """Add the paths of images that this process could not read, with the reasons."""
        for path, reason in images:
            if path not in self._reasons and all(path != known for known, _ in self._new):
                self._new.append((path, reason))

    @property
    def unshared(self) -> int:
        """How many the other processes have not been told of yet."""
        return len(self._new)

    def share(self) -> None:
        """Tell the other processes; every process must call it.

        Raises:
            TooManyUnreadable: there are more than the limit; raised on all processes.
            OSError: the file cannot be written.
        """
        found = {path: reason for images in self._ranks.gather(self._new) for path, reason in images}
        fresh = {path: reason for path, reason in found.items() if path not in self._reasons}
        self._new = []
        self._reasons.update(fresh)
        if fresh and self._ranks.is_first:
            first = not self.path.exists()
            with self.path.open("a", newline="", encoding="utf-8") as file:
                writer = csv.writer(file, lineterminator="\n")
                if first:
                    writer.writerow(("path", "reason"))
                writer.writerows(fresh.items())
            self._announce(fresh)
        if len(self._reasons) > self._limit:
            last = next(reversed(self._reasons))
            raise TooManyUnreadable(
                f"{len(self._reasons)} images cannot be read, more than max_unreadable {self._limit}; all "
                f"are in {self.path}, the last is {last} ({self._reasons[last]})"
            )

    def _announce(self, fresh: Mapping[str, str]) -> None:
        """Print the first unreadable images, and then their number at each power of ten."""
        before = len(self._reasons) - len(fresh)
        for number, (path, reason) in enumerate(fresh.items(), start=before + 1):
            if number <= _ANNOUNCED:
                print(f"{path} cannot be read: {reason}", flush=True)
            elif set(f"{number}") <= {"1", "0"} and f"{number}".count("1") == 1:
                print(f"{number:,} images cannot be read; all are in {self.path}", flush=True)

    def state(self) -> list[tuple[str, str]]:
        """Return all paths and reasons, for a checkpoint."""
        return list(self._reasons.items())

    def load_state(self, state: Iterable[tuple[str, str]]) -> None:
        """Take what :meth:`state` returned."""
        self._reasons = dict(state)

    def begin(self) -> None:
        """Write the file anew: a resumed run finds again what it had found after its checkpoint.

        Raises:
            OSError: the file cannot be written.
        """
        if not self._ranks.is_first:
            return
        if not self._reasons:
            self.path.unlink(missing_ok=True)
            return
        with replacing(self.path) as file:
            csv.writer(file, lineterminator="\n").writerows([("path", "reason"), *self._reasons.items()])
