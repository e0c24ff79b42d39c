"""The figures of a run over its steps: a CSV file, and TensorBoard's events where it is installed."""

from __future__ import annotations

import csv
import os
import secrets
from pathlib import Path
from typing import Any

from evit_ext._util.files import replacing
from evit_ext._util.messages import shown

#: The figures of a record, besides its step, epoch and kind, in the order of the file's columns.
FIGURES = (
    "loss",
    "top1",
    "top5",
    "lr",
    "keep_rate",
    "tokens_kept",
    "images_per_second",
    "grad_norm",
    "memory",
    "unreadable",
)

#: Of a step of training, the means of an epoch, of an evaluation, and of one of the weights' moving average.
KINDS = ("train", "epoch", "val", "ema")

_COLUMNS = ("step", "epoch", "kind", *FIGURES)


class Metrics:
    """Writes ``metrics.csv``, a line a record, and TensorBoard events in ``tensorboard``, in a folder.

    When :meth:`write` returns, the operating system has the line. Cells of figures that a record lacks are
    empty. Numbers are written with all their digits, so that reading them gives the same bits.

    A resumed run repeats the steps after its checkpoint. Lines of these steps, and a line that a kill left
    incomplete, are removed first, so that every step is in the file once.

    Args:
        folder: made if it is not there.
        tensorboard: True for its events, False for none, "auto" for events if the package is installed.
        enabled: False writes nothing; for all processes but the first.
        resume_step: the step of the checkpoint that the run resumes from; None replaces an existing file.
        wandb: project of Weights & Biases to which records are written, too, in a run of the folder's name;
            None for none.

    Raises:
        ValueError: `tensorboard` is something else, or the file to continue has other columns.
        RuntimeError: `tensorboard` is True or `wandb` is given, and the package is not installed.
        OSError: it cannot be written.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        tensorboard: bool | str = "auto",
        enabled: bool = True,
        resume_step: int | None = None,
        wandb: str | None = None,
    ) -> None:
        if tensorboard not in (True, False, "auto"):
            raise ValueError(f"tensorboard must be True, False or 'auto', got {shown(tensorboard)}")
        self._file: Any = None
        self._events: Any = None
        self._wandb: Any = None
        #: Steps and kinds of the records at the step of the checkpoint, which may be written again.
        self._there: set[tuple[int, str]] = set()
        if not enabled:
            return
        writer = None if tensorboard is False else _summary_writer(tensorboard)
        if wandb is not None:
            self._wandb = _start_wandb(wandb, Path(folder), resume_step is not None)
        self.path = Path(folder) / "metrics.csv"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        lines = [] if resume_step is None else _lines_up_to(self.path, resume_step)
        self._there = {(int(line[0]), line[2]) for line in lines if int(line[0]) == resume_step}
        with replacing(self.path) as file:
            _writer(file).writerows([_COLUMNS, *lines])
        self._file = self.path.open("a", newline="")
        if writer is not None:
            # Events from this step on are hidden: they are written again.
            purge_step = 0 if resume_step is None else resume_step + 1
            self._events = writer(str(Path(folder) / "tensorboard"), purge_step=purge_step)

    def write(self, step: int, epoch: int, kind: str, **figures: float | None) -> None:
        """Write a record, unless the file of a resumed run has one of this step and kind.

        Args:
            step: optimizer steps done.
            epoch: from 1.
            kind: one of :data:`KINDS`.
            figures: of :data:`FIGURES`; top1 and top5 in percent, memory in bytes; None for an empty cell.

        Raises:
            ValueError: another kind or another figure.
            OSError: it cannot be written.
        """
        if kind not in KINDS:
            raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {shown(kind)}")
        unknown = sorted(set(figures) - set(FIGURES))
        if unknown:
            raise ValueError(f"figures are {', '.join(FIGURES)}, got {', '.join(unknown)}")
        if self._file is None or (step, kind) in self._there:
            return
        said = {name: _number(value) for name, value in figures.items() if value is not None}
        cells = (repr(said[name]) if name in said else "" for name in FIGURES)
        try:
            _writer(self._file).writerow([step, epoch, kind, *cells])
            self._file.flush()
        except OSError as error:
            error.filename = str(self.path)  # an error of a full disk does not name the file
            raise
        if self._events is not None:
            for name, value in said.items():
                self._events.add_scalar(f"{kind}/{name}", value, step)
            self._events.flush()
        if self._wandb is not None:
            self._wandb.log({f"{kind}/{name}": value for name, value in said.items()}, step=step)

    def sync(self) -> None:
        """Write all lines to the disk, so that they survive a power failure."""
        if self._file is not None:
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the files; nothing can be written after it."""
        if self._file is not None:
            self._file.close()
            self._file = None
        if self._events is not None:
            self._events.close()
            self._events = None
        if self._wandb is not None:
            self._wandb.finish()
            self._wandb = None

    def __enter__(self) -> Metrics:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def _writer(file: Any) -> Any:
    return csv.writer(file, lineterminator="\n")


def _number(value: Any) -> int | float:
    """Return a Python number, of a tensor or NumPy's scalar, too."""
    return value if type(value) is int else float(value)


def _lines_up_to(path: Path, step: int) -> list[list[str]]:
    """Return the complete lines of the file up to a step, without the header; none if there is no file.

    Raises:
        ValueError: it has other columns.
    """
    if not path.exists():
        return []
    # A kill can leave an incomplete line, and a power failure zeros or other bytes.
    whole, _, _ = path.read_text(errors="replace").replace("\0", "").rpartition("\n")
    header, *lines = list(csv.reader(whole.splitlines())) or [list(_COLUMNS)]
    if tuple(header) != _COLUMNS:
        raise ValueError(
            f"{path} has the columns {','.join(header)}, expected {','.join(_COLUMNS)}: it is of another "
            "version; move it away to go on"
        )
    return [line for line in lines if len(line) == len(_COLUMNS) and _is_up_to(line[0], step)]


def _is_up_to(cell: str, step: int) -> bool:
    return cell.isdecimal() and int(cell) <= step


def _start_wandb(project: str, folder: Path, goes_on: bool) -> Any:
    """Return a run of Weights & Biases, the same one if the folder's run goes on."""
    try:
        import wandb
    except ImportError as error:
        raise RuntimeError(
            f"records are to be written to Weights & Biases, but it cannot be imported ({error}): "
            "pip install wandb, or leave out --wandb"
        ) from error
    # Not the folder's name: two folders may have the same one, and not all letters are allowed.
    place = folder / "wandb" / "id.txt"
    number = place.read_text() if goes_on and place.is_file() else secrets.token_hex(8)
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_text(number)
    return wandb.init(project=project, name=folder.resolve().name, id=number, dir=str(folder), resume="allow")


def _summary_writer(tensorboard: bool | str) -> Any:
    """Return TensorBoard's class of writers; None if the package is neither installed nor required."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        if tensorboard == "auto":
            return None
        raise RuntimeError(
            f"TensorBoard's events are to be written, but it cannot be imported ({error}): "
            'pip install "evit_ext[train]", or leave out --tensorboard'
        ) from error
    return SummaryWriter
