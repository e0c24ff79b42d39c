"""What somebody may have meant by a name that is not known: by its meaning, else by its letters."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable

from evit_ext._util.messages import shown

#: Names that other programs have for fields and options of this one.
_MEANINGS = {
    "learning_rate": "lr", "base_lr": "lr", "lr0": "lr", "min_learning_rate": "min_lr", "lrf": "min_lr",
    "batch": "batch_size", "bs": "batch_size", "batchsize": "batch_size", "epoch": "epochs",
    "num_epochs": "epochs", "warmup": "warmup_epochs", "opt": "optimizer", "wd": "weight_decay",
    "clip_grad_norm": "clip_grad", "smoothing": "label_smoothing", "aa": "auto_augment",
    "imgsz": "img_size", "image_size": "img_size", "input_size": "img_size", "resolution": "img_size",
    "classes": "num_classes", "nb_classes": "num_classes", "drop_path_rate": "drop_path",
    "num_workers": "workers", "threads": "workers", "j": "workers", "data_dir": "data", "data_path": "data",
    "dataset_dir": "data", "train": "train_split", "val": "val_split", "valid": "val_split",
    "test": "val_split", "amp": "precision", "dtype": "precision", "fp16": "precision", "half": "precision",
    "weights": "checkpoint", "ckpt": "checkpoint", "resume_from": "resume", "out": "output",
    "output_dir": "output", "out_dir": "output", "save_dir": "output", "project": "output", "name": "output",
    "gpu": "device", "cuda": "device", "keep": "keep_rate", "keep_ratio": "keep_rate",
    "base_keep_rate": "keep_rate", "model_kwargs": "model_args", "ema": "ema_decay", "model_ema": "ema_decay",
    "patience": "epochs", "from_pretrained": "pretrained", "finetune": "initial_checkpoint",
    "init": "initial_checkpoint", "gradient_accumulation": "micro_batch", "accum_iter": "micro_batch",
    "ort": "onnxruntime", "onnx": "onnxruntime", "onnx_runtime": "onnxruntime", "ov": "openvino",
    "eager": "torch", "pytorch": "torch", "compile": "torch_compile", "inductor": "torch_compile",
    "flip": "hflip", "fliplr": "hflip", "best": "last", "untrained": "random_weights",
}  # fmt: skip


def nearest(name: str, known: Iterable[str]) -> str | None:
    """Return the known name that was probably meant, None if there is none; ``-`` and ``_`` are the same.

    Args:
        name: as it came, such as ``--learning-rate`` or ``learning_rate``.
        known: in the same way.
    """
    plain = {_plain(each): each for each in known}
    meant = _MEANINGS.get(_plain(name))
    if meant in plain:
        return plain[meant]
    found = difflib.get_close_matches(_plain(name), plain, 1)
    return plain[found[0]] if found else None


def unknown_model(name: str, ours: Collection[str], others: Collection[str]) -> ValueError:
    """Return the error for a name that no model has, with the nearest names.

    Args:
        name: as it came.
        ours, others: names of this package's models, and of further ones.
    """
    # At most so much of it, as comparing takes time by the square of it.
    near = difflib.get_close_matches(name[:100], {*ours, *others}, n=3)
    expected = (
        f"the nearest names are {', '.join(near)}"
        if near
        else f"expected one of {', '.join(ours)}, or a name of timm's"
    )
    return ValueError(f"there is no model {shown(name)}: {expected}")


def _plain(name: str) -> str:
    return name.lstrip("-").replace("-", "_").lower()
