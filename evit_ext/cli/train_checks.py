"""What ``evit train`` finds wrong before it begins, all at once, and the settings that nobody has chosen.

:func:`check` imports neither torch nor timm, which take seconds: what is wrong is told before.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evit_ext._util.places import is_path
from evit_ext.cli.model_names import problem_with_model
from evit_ext.cli.output import check_writable, words_of
from evit_ext.data.listing import Listing
from evit_ext.data.sizes import steps_per_epoch
from evit_ext.training.config import TrainConfig, load_config
from evit_ext.training.data_fit import FITTED, RECIPE, fit_to_data
from evit_ext.training.folder_data import open_folder
from evit_ext.training.recipe import raise_problems
from evit_ext.training.run.checkpoints import RunCheckpoints

if TYPE_CHECKING:
    from evit_ext.training.ranks import Ranks

# The fields that are checked even where others are wrong.
_ABOUT_DATA = (
    "dataset", "data", "train_split", "val_split", "val_fraction", "num_classes", "initial_checkpoint",
    "teacher_checkpoint", "oracle_checkpoint", "token_labels",
)  # fmt: skip


@dataclass
class Checked:
    """What came of the command line.

    Attributes:
        config: of the run.
        images: to train on, where settings are to be fitted to their number; else None.
        goes_on: whether the run's folder has checkpoints, so that no other weights are needed.
        listings: of the folders that were listed, by their paths.
    """

    config: TrainConfig
    images: int | None = None
    goes_on: bool = False
    listings: dict[str, Listing] = field(default_factory=dict)


def check(
    recipe: str | None, given: Mapping[str, Any], output: Path, world_size: int, wrong: Sequence[str] = ()
) -> Checked:
    """Return the configuration of a run, with settings that fit its data where nobody has chosen them.

    Args:
        recipe: name or file, or None.
        given: the fields that were given.
        output: folder of the run; if there is one that was interrupted, it has chosen already.
        world_size: processes.
        wrong: what is known to be wrong already.

    Raises:
        ValueError: with all that is wrong with the fields, the data and the folder.
    """
    problems = list(wrong)
    # What is fitted below must not contradict what is given before it is fitted.
    before = {"warmup_epochs": 0.0} if recipe == RECIPE else {}
    config = _attempt(problems, lambda: load_config(recipe, **{**before, **given}))
    checked = Checked(TrainConfig() if config is None else config)
    checked.goes_on = bool(_attempt(problems, RunCheckpoints(output / "checkpoints").steps))
    if config is not None and config.dataset == "" and recipe == RECIPE:
        _attempt(problems, lambda: _fit(checked, given, output, world_size))
    elif config is not None:
        problems += _wrong_data(config, world_size, checked.listings)
    else:
        data = {name: given[name] for name in _ABOUT_DATA if name in given}
        about_data = _attempt([], lambda: load_config(None, batch_size=1, warmup_epochs=0.0, **data))
        if about_data is not None:
            problems += _wrong_data(about_data, world_size, checked.listings)
    model = given.get("model", "deit_small") if config is None else config.model
    if problem := problem_with_model(model):
        problems.insert(0, problem)
    _attempt(problems, lambda: _check_output(output))
    raise_problems(problems)
    return checked


def with_weights(checked: Checked, given: Mapping[str, Any], ranks: Ranks) -> TrainConfig:
    """Return the configuration for the pretrained weights that can be had; every process must call it.

    Raises:
        ValueError: they are asked for, and cannot be had.
    """
    from evit_ext.training.hub import missing_weights  # here, because it brings torch, which takes seconds

    config = checked.config
    other = config.initial_checkpoint is not None or config.oracle is not None
    if checked.goes_on or other or not config.pretrained:
        return config
    reason = ranks.gather(missing_weights(config.model, config.model_args))[0]
    if not reason:
        return config
    if checked.images is None or given.get("pretrained"):
        raise ValueError(
            f"the pretrained weights of {config.model} cannot be had ({reason}): start from a file with "
            "--no-pretrained --initial-checkpoint FILE, or from random weights with --no-pretrained"
        )
    if ranks.is_first:
        print(
            f"the pretrained weights of {config.model} cannot be had ({reason}): training from random ones, "
            "which takes far more images to be good; weights of a file: --initial-checkpoint FILE",
            file=sys.stderr,
            flush=True,
        )
    return fit_to_data(config, given, checked.images, False, ranks.world_size)


def _attempt(problems: list[str], call: Any) -> Any:
    try:
        return call()
    except (ValueError, TypeError, OSError, ModuleNotFoundError) as error:
        problems += [line.strip() for line in words_of(error).splitlines() if "things are wrong:" not in line]
        return None


def _fit(checked: Checked, given: Mapping[str, Any], output: Path, world_size: int) -> None:
    config = checked.config
    if checked.goes_on and (output / "config.yaml").is_file():
        before = load_config(output / "config.yaml")
        checked.config = replace(
            config, **{name: getattr(before, name) for name in FITTED if name not in given}
        )
        return
    train, _ = open_folder(config, training=True, listings=checked.listings)
    assert train is not None
    checked.images = len(train)
    checked.config = fit_to_data(config, given, checked.images, config.pretrained, world_size)
    raise_problems(_wrong_data(checked.config, world_size, checked.listings))


def _wrong_data(config: TrainConfig, world_size: int, listings: dict[str, Listing]) -> list[str]:
    """Return what is wrong with the data of a folder, with its size, and with files that are named."""
    problems: list[str] = []
    _attempt(problems, lambda: config.micro_batches(world_size))
    if config.dataset == "" and config.data is not None:
        opened = _attempt(problems, lambda: open_folder(config, training=True, listings=listings))
        if opened is not None:
            _attempt(problems, lambda: steps_per_epoch(len(opened[0]), config.batch_size))
        found = 0 if opened is None else len(opened[0].classes)
        if found == 1:
            problems.append(
                f"{opened[0].source} has one class only, {next(iter(opened[0].classes))}: expected a folder "
                "for each of two classes or more"
            )
        if config.num_classes is not None and config.num_classes < found:
            problems.append(f"num_classes is {config.num_classes}, but the data has {found} classes")
    for name in ("initial_checkpoint", "teacher_checkpoint", "oracle_checkpoint", "token_labels"):
        path = getattr(config, name)
        if path is not None and is_path(path) and not Path(path).expanduser().exists():
            problems.append(f"{name}: there is no {path} in {Path.cwd()}")
    return problems


def _check_output(output: Path) -> None:
    if output.exists() and not output.is_dir():
        raise NotADirectoryError(f"{output}: is a file, expected a run's folder")
    check_writable(output / "config.yaml")
