"""A folder in which the documentation's commands can be run: small stand-ins under the names that it uses."""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from image_data import crop, write_folder

from evit_ext import models
from evit_ext.cli import main

_TINY = (
    "--model vit_tiny_patch16_224 --model-args patch_size=8 embed_dim=24 depth=4 num_heads=2 --img-size 32 "
    "--drop-loc none --epochs 1 --warmup-epochs 0 --batch-size 64 --workers 0 --keep-rate-start-epoch 0 "
    "--keep-rate-end-epoch 1 --no-tensorboard --no-progress --repeated-aug 0 --auto-augment none "
    "--device cpu --output {new}"
)

#: Options that a command is given besides, by a pattern: a small model for a moment instead of the named one.
#: {new} is a folder that is not there yet.
MADE_SMALL = {
    r"evit train .*(cluttered-digits|config\.yaml)": f"{_TINY} --train-images 64",
    r"evit train .*imagenet": f"{_TINY} --batch-size 8",
    r"evit train --data photos": f"{_TINY} --batch-size 4",
    r"evit report ": "--images 2 --device cpu",
    r"evit eval ": "--repeats 1 --batch-size 64 --device cpu",
    r"evit benchmark ": "--img-size 32 --precision float32 --seconds 0.1 --latency-calls 1 --device cpu",
}


def further_options(command: str, new: Path) -> list[str]:
    """The options that a command is given besides, so that it takes a moment."""
    fitting = (options for pattern, options in MADE_SMALL.items() if re.match(pattern, command))
    return [option.format(new=new) for options in fitting for option in shlex.split(options)]


def prepare(folder: Path) -> Path:
    """Make photographs, data, runs and files of weights in `folder`, which is returned."""
    with _inside(folder):
        write_folder(folder / "imagenet", 8, 4)
        shutil.copytree("imagenet/train", "photos")
        (folder / "holiday").mkdir()
        for number, path in enumerate(("photo.jpg", "digit.png", "holiday/a.jpg", "holiday/b.jpg")):
            crop(number % 2, number).save(folder / path)
        trained = {"epoch": 299, "args": argparse.Namespace(base_keep_rate=0.7)}
        torch.save({"model": models.deit_small().state_dict(), **trained}, "evit.pth")
        command, run = ["train", "--recipe", "cluttered-digits"], Path("runs/a")
        assert main([*command, *further_options(f"evit {shlex.join(command)}", run)]) == 0
        for name in ("cluttered-digits", "digits", "imagenet-300", "small"):
            shutil.copytree(run, run.with_name(name))
    return folder


@contextlib.contextmanager
def _inside(folder: Path) -> Iterator[None]:
    """contextlib.chdir, which Python 3.10 has not."""
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)
