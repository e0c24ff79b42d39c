"""Read a checkpoint file without executing anything that is in it."""

from __future__ import annotations

import argparse
import errno
import pickle
import re
import threading
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from evit_ext._util.messages import reason, shortened, shown


class Ignored:
    """What stands next to the weights and is not looked at: it swallows whatever it is made of."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __setstate__(self, _: Any) -> None:
        pass


# What training scripts save next to the weights, besides what torch allows itself. NumPy's and pathlib's own
# code is not run either: what these names would make is Ignored.
_SAFE: list[Any] = [
    argparse.Namespace,
    *(
        (Ignored, f"{module}.{name}")
        for module, names in {
            "numpy": ("dtype", "ndarray"),
            "numpy.core.multiarray": ("scalar", "_reconstruct"),
            "numpy._core.multiarray": ("scalar", "_reconstruct"),
            "pathlib": ("PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath"),
            "pathlib._local": ("PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath"),
        }.items()
        for name in names
    ),
]


def _file_format(path: Path, name: str) -> str:
    """Return "safetensors", "zip" (torch's) or "pickle" (torch's before 1.6), by the file's first bytes.

    Raises:
        ValueError: it is none of them; what it is instead is said of `name`.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(512)
    if not start:
        raise ValueError(f"{name} is empty")
    text = start.lstrip().lower()
    if text.startswith((b"<!doctype", b"<html", b"<?xml", b"<head")):
        raise ValueError(
            f"{name} is a web page, not a checkpoint: what pages share must often be fetched by hand; "
            "download the file with a browser and give its path"
        )
    if text.startswith(b"version https://git-lfs"):
        raise ValueError(f"{name} is a Git LFS pointer, not the file itself: fetch it with git lfs pull")
    # A safetensors file begins with its header's length, in 8 bytes, and the header, which is JSON.
    if start[8:9] == b"{" and int.from_bytes(start[:8], "little") < 100_000_000:
        return "safetensors"
    if start.startswith(b"PK\x03\x04"):
        return _zip_format(path, name, size)
    if start.startswith(b"\x80"):
        return "pickle"
    if start.startswith((b"\x93NUMPY", b"\x89HDF", b"\x1f\x8b", b"{")):
        kinds = {0x93: "a NumPy array", 0x89: "an HDF5 file", 0x1F: "compressed by gzip"}
        raise ValueError(f"{name} is {kinds.get(start[0], 'a JSON file')}; {_EXPECTED}")
    raise ValueError(f"{name} is no checkpoint, it begins with {shown(start[:16])}; {_EXPECTED}")


_EXPECTED = "expected a file that torch.save wrote (.pth, .pt, .pth.tar, .bin) or safetensors"


def _zip_format(path: Path, name: str, size: int) -> str:
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            compressed = [entry.filename for entry in archive.infolist() if entry.compress_type]
    except zipfile.BadZipFile as error:
        raise ValueError(f"{name} is not complete, or damaged: it has {size} bytes, and no end") from error
    except Exception as error:  # what zipfile raises of names and versions that make no sense is anything
        if isinstance(error, OSError) and error.errno != errno.EINVAL:
            raise  # of the disk, not of what is on it
        raise ValueError(f"{name} is damaged: {reason(error)}") from error
    if any(entry.endswith(".npy") for entry in names):
        raise ValueError(
            f"{name} is a NumPy archive, as JAX's vision transformers are published in: timm reads them, "
            "with model.load_pretrained(path)"
        )
    if any(entry.endswith("/constants.pkl") for entry in names):
        raise ValueError(
            f"{name} is a TorchScript archive, which has code in it: where you trust it, "
            "torch.save(torch.jit.load(path).state_dict(), new_path) takes the weights out"
        )
    if not any(entry.endswith("data.pkl") for entry in names):
        raise ValueError(f"{name} is a zip archive that torch.save did not write; {_EXPECTED}")
    if compressed:
        raise ValueError(
            f"{name} is compressed (in it {shortened(compressed[0])}), as torch.save's files never are: "
            "unpack it and zip it without compression, or save the weights again"
        )
    return "zip"


_LOCK = threading.Lock()


@contextmanager
def _allowing(entries: list[Any]) -> Iterator[None]:
    # Leaving torch's context takes away what the caller has allowed himself, too.
    allowed = torch.serialization.get_safe_globals()
    with torch.serialization.safe_globals([entry for entry in entries if entry not in allowed]):
        yield


def read_file(path: Path, name: str) -> Any:
    """Return what is in the file at `path`, on the CPU.

    Only tensors, plain Python values and ``argparse.Namespace`` come out of a pickle; NumPy's numbers and
    arrays and pathlib's paths come out as :class:`Ignored`. Everything else is refused, before any of it
    runs.

    Raises:
        ValueError: the file is no checkpoint, is damaged, or holds what would have to be executed; said of
            `name`.
    """
    form = _file_format(path, name)
    if form == "safetensors":
        try:
            return load_file(path, device="cpu")
        except SafetensorError as error:
            raise ValueError(f"{name} is not complete, or damaged: {reason(error)}") from error
    # What is allowed, torch keeps for the whole process: one thread at a time.
    with _LOCK, _allowing(_SAFE):
        try:
            # Mapped, so that an optimizer's state, which nobody asks for, is not read at all.
            return torch.load(path, map_location="cpu", weights_only=True, mmap=form == "zip")
        except OSError:  # of the disk, not of what is on it
            raise
        except Exception as error:  # what torch raises on a damaged file is anything
            refused = _refused(path, form, str(error)) if isinstance(error, pickle.UnpicklingError) else []
            if not refused:
                said = f"{type(error).__name__}: {shortened(str(error).partition(chr(10))[0])}"
                raise ValueError(f"{name} is damaged, or no checkpoint ({said})") from error
            raise ValueError(
                f"{name} holds more than weights: {', '.join(map(shortened, refused[:40]))}. To make these, "
                "Python would have to execute what the file says, so it was refused; nothing was executed. "
                "If you trust where the file comes from, convert it once: torch.load(path, "
                "weights_only=False) reads it, executing it, and torch.save(its state dict, new_path) writes "
                "a file of weights alone"
            ) from error


def _refused(path: Path, form: str, message: str) -> list[str]:
    """Return the names in a pickle that are not allowed, as far as torch tells."""
    if form == "zip":
        try:
            names = torch.serialization.get_unsafe_globals_in_checkpoint(str(path))
        except Exception:  # what it raises on a damaged file is not documented
            names = []
        if names:
            return sorted(names)
    # The first one, then: "... global: GLOBAL name was ..." or "... unsupported GLOBAL name whose ...".
    return re.findall(r"GLOBAL (\S+) w", message)[:1]
