"""The folder of a run: whether a configuration may use it, and the names of its classes."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path

from evit_ext._util.messages import shown
from evit_ext.training.config import TrainConfig, load_config
from evit_ext.training.ranks import Ranks

#: Has the names of the classes, a line for each in the order of the logits.
CLASSES_FILE = "classes.txt"

# Fields that may differ when a run is resumed, because they change neither what is learned nor the order of
# the images. (Another micro_batch, like another number of processes, changes random numbers of mixup and drop
# path.)
_MAY_CHANGE = (
    "workers", "max_unreadable", "micro_batch", "checkpoint_every", "keep_checkpoints", "eval_every",
    "log_every", "data", "teacher_checkpoint", "oracle_checkpoint", "initial_checkpoint",
)  # fmt: skip


# Fields that may be the path of a file or folder.
_PATHS = ("data", "initial_checkpoint", "teacher_checkpoint", "oracle_checkpoint", "token_labels")


def with_absolute_paths(config: TrainConfig) -> TrainConfig:
    """Return a configuration whose paths hold in any folder: those that exist are made absolute."""
    paths = {name: getattr(config, name) for name in _PATHS}
    there = {name: os.path.abspath(path) for name, path in paths.items() if path and os.path.exists(path)}
    return dataclasses.replace(config, **there)


def check_classes(folder: Path, classes: Sequence[str]) -> None:
    """Raise ValueError if a run goes on with data whose classes are not those that it began with."""
    path = folder / CLASSES_FILE
    if not path.exists():
        return
    before = path.read_text("utf-8").splitlines()
    if before != list(classes):
        changed = [f"+{name}" for name in classes if name not in before]
        changed += [f"-{name}" for name in before if name not in classes]
        raise ValueError(
            f"{folder} has a run of {len(before)} other classes ({path}); the data now differs in "
            f"{', '.join(changed[:8]) or 'their order'}: choose another folder, or the run's own data"
        )


def check_folder(
    folder: Path, config: TrainConfig, steps: Sequence[int], ranks: Ranks, may_resume: bool
) -> None:
    """Refuse a folder that belongs to another run.

    Every process must call it.

    Args:
        folder: of the run; it exists.
        config: what the run does.
        steps: of the checkpoints that this process sees in the folder, ascending.
        ranks: the processes.
        may_resume: whether the run may continue from these checkpoints.

    Raises:
        ValueError: the folder has checkpoints that may not be resumed, or are of another configuration; or
            the processes see different ones.
    """
    if steps and not may_resume:
        raise ValueError(
            f"{folder} has checkpoints, the newest of step {steps[-1]}: resume from it with --resume auto, "
            "or choose another folder"
        )
    seen = ranks.gather(steps)
    if any(other != seen[0] for other in seen):
        raise ValueError(
            f"the processes see different checkpoints in {folder}: {seen}; it must be a folder that all "
            "machines share"
        )
    path = folder / "config.yaml"
    if steps and path.exists():
        both = (load_config(path), with_absolute_paths(config))
        before, now = (dataclasses.asdict(each) for each in both)
        different = [name for name in now if now[name] != before[name] and name not in _MAY_CHANGE]
        if different:
            said = ", ".join(f"{name} was {shown(before[name])}, is {shown(now[name])}" for name in different)
            raise ValueError(
                f"{folder} has a run with another configuration ({said}): choose another folder, or repeat "
                "that run's options to resume it"
            )
    ranks.barrier()  # from here on, the first process may replace the file
