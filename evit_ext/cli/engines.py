"""The engine that ``evit eval`` has compute the logits, and what it computes in."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from evit_ext.export import Metadata, read_metadata, why_not
from evit_ext.export.engines import FILE_ENGINES, check_engine, in_engine
from evit_ext.patching.keep_rates import set_keep_rate
from evit_ext.training.config import TrainConfig
from evit_ext.training.precision import Precision, choose_precision


@dataclass(frozen=True)
class Engine:
    """What computes the logits.

    Attributes:
        name: of :data:`evit_ext.export.ENGINES`.
        file: an exported file that it runs; None for one that is made of the model.
        metadata: of the file.
    """

    name: str
    file: str | None = None
    metadata: Metadata | None = None

    def configured(self, config: TrainConfig) -> TrainConfig:
        """Return the configuration, in which images are prepared as the file says."""
        return config if self.metadata is None else replace(config, crop_pct=self.metadata.crop_pct)

    def prepared(self, image: Mapping[str, Any]) -> dict[str, Any]:
        """Return how images are prepared, which is as the file says.

        Raises:
            ValueError: the file takes images of another size than the model.
        """
        if self.metadata is None:
            return dict(image)
        if tuple(image["input_size"]) != self.metadata.input_size:
            raise ValueError(
                f"{self.file} takes images of {' x '.join(map(str, self.metadata.input_size))}, and the "
                f"model {' x '.join(map(str, image['input_size']))}: it is of another model"
            )
        names = ("mean", "std", "interpolation", "crop_pct", "crop_mode")
        return {**image, **{name: getattr(self.metadata, name) for name in names}}

    def precision(self, device: torch.device, asked: str) -> tuple[str, str, Precision]:
        """Return a precision by its name, why it was chosen, and what autocast is to do.

        Args:
            device: what the model is on.
            asked: "auto" or the name of a precision.

        Raises:
            ValueError: the engine does not compute in what is asked for.
        """
        if self.name not in FILE_ENGINES:
            chosen = choose_precision(device, asked)
            return str(chosen.dtype).removeprefix("torch."), chosen.reason, chosen
        exact = Precision(torch.float32, "of the images")
        is_int8 = self.metadata is not None and self.metadata.quantization == "int8"
        if asked == "auto":
            if is_int8:
                return "float32", "and int8 where the file has it", exact
            found = "float32" if why_not(self.name, "bfloat16") else "bfloat16"
            return found, f"what {self.name} has here", exact
        reason = why_not(self.name, asked)
        if reason is not None:
            raise ValueError(
                f"{self.name} does not compute in {asked} here: {reason}; give --precision float32"
            )
        return asked, "as asked" + (", and int8 where the file has it" if is_int8 else ""), exact

    @contextmanager
    def running(self, model: nn.Module, precision: str) -> Iterator[nn.Module]:
        """Provide what is evaluated: the model, or what has its logits computed by the engine."""
        if self.name == "torch":
            yield model
            return
        with in_engine(model.eval(), self.name, precision, self.file) as served:
            yield served


def chosen_engine(options: argparse.Namespace) -> Engine:
    """Return the engine that is asked for, checked as far as that goes before a model is built.

    Raises:
        ValueError: options that do not go together, or a file that says nothing of itself.
        FileNotFoundError: there is no such file.
        RuntimeError: a package that the engine needs is missing.
    """
    name, file = options.engine, options.exported
    if file is not None and name not in FILE_ENGINES:
        raise ValueError(f"--exported is for --engine {' or '.join(FILE_ENGINES)}, got --engine {name}")
    check_engine(name)
    if name in FILE_ENGINES:
        if options.device == "cuda":
            raise ValueError(f"--engine {name} runs on the CPU here, got --device cuda")
        options.device = "cpu"
    if file is None:
        return Engine(name)
    if options.keep_rates is not None:
        raise ValueError("--keep-rate is for a model, and a file of --exported has its own")
    return Engine(name, file, read_metadata(file))


def set_files_keep_rate(model: nn.Module, engine: Engine) -> None:
    """Give a model the keep rate that a file has, for what is said of its tokens and cost.

    Raises:
        ValueError: it has other stages.
    """
    if engine.metadata is not None and engine.metadata.keep_rate:
        rates = engine.metadata.keep_rate
        set_keep_rate(model, rates[0] if len(set(rates)) == 1 else rates)
