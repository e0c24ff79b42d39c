"""Where a checkpoint is: a path, a URL or a repository of the Hugging Face hub; in the end, a local file."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from urllib.error import HTTPError
from urllib.parse import unquote, urlsplit

import torch

from evit_ext._util.files import replacing_path
from evit_ext._util.messages import shown
from evit_ext._util.places import HUB_PREFIXES
from evit_ext.models.building import is_connection_error

_HUB_FILES = ("model.safetensors", "pytorch_model.bin")
_SCHEME = re.compile(r"([a-zA-Z][a-zA-Z0-9+.-]*)://")
# As torch.hub, but for the 8 digits, "lvvit_s-26M-224-83.3.pth.tar" has no hash, nor has a date.
_HASH = re.compile(r"-(?!\d{8}\.)([a-f0-9]{8,64})\.")
_OFFLINE = "Without a network, bring the file here another way and give its path"


def local_file(source: str | os.PathLike[str], progress: bool, check: Callable[[Path, str], object]) -> Path:
    """Return the local file that `source` stands for; fetch it where it is not there yet.

    Args:
        source: a path; an http(s) URL, whose file goes into torch's cache; ``hf-hub:owner/name[@revision]``.
        progress: show that of a download.
        check: of a fetched file and what to call it; raises where it is no checkpoint, which then does not
            stay in the cache.

    Raises:
        TypeError, ValueError: `source` is nothing of the kind, or a download does not have the hash that its
            name ends in.
        FileNotFoundError, IsADirectoryError: there is no such file.
        RuntimeError: it could not be fetched.
    """
    if not isinstance(source, (str, os.PathLike)):
        raise TypeError(f"path_or_url must be a path or a URL, got {type(source).__name__}")
    if isinstance(source, str):
        if source.startswith(HUB_PREFIXES):
            return hub_file(source, _HUB_FILES)
        scheme = _SCHEME.match(source)
        if scheme and scheme[1].lower() in ("https", "http"):
            return _from_url(source, progress, check)
        if scheme:
            raise ValueError(
                f"path_or_url must be a path, an http(s) URL or hf-hub:owner/name, got {shown(source)}"
            )
    path = Path(source).expanduser()
    if path.is_dir():
        inside = sorted(p.name for p in path.iterdir() if p.is_file() and not p.name.startswith("."))[:5]
        found = f"; in it: {', '.join(inside)}" if inside else ""
        raise IsADirectoryError(f"{path} is a folder: give the file in it{found}")
    if not path.exists():
        looked = "" if path.is_absolute() else f" in {Path.cwd()}"
        raise FileNotFoundError(f"there is no file {path}{looked}")
    return path


def _from_url(url: str, progress: bool, check: Callable[[Path, str], object]) -> Path:
    parts = urlsplit(url)
    name = unquote(parts.path).rsplit("/", 1)[-1] or "checkpoint"
    digits = _HASH.search(name)
    folder = Path(torch.hub.get_dir()) / "checkpoints"
    if digits is None:
        # Many files are called checkpoint.pth: without a hash, a name does not tell which one it is.
        folder = folder / hashlib.sha256(url.encode()).hexdigest()[:16]
    file = folder / name
    if file.exists():
        return file
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with replacing_path(file) as unfinished:  # others may be fetching it too
            torch.hub.download_url_to_file(url, str(unfinished), digits and digits[1], progress)
            check(unfinished, url)
    except HTTPError as error:
        raise RuntimeError(
            f"{url} could not be fetched: the server answered {error.code} {error.reason}"
        ) from error
    except RuntimeError as error:
        if digits is None or "invalid hash value" not in str(error):
            raise
        raise ValueError(
            f"what {url} gave is not the file of that name: its SHA-256 does not begin with {digits[1]}, "
            "which the name ends in. It was not kept"
        ) from error
    except Exception as error:
        if is_connection_error(error):
            reason = getattr(error, "reason", None) or error
            raise RuntimeError(
                f"{url} could not be fetched, nor is it in torch's cache ({type(error).__name__}: {reason}). "
                f"{_OFFLINE}"
            ) from error
        raise
    return file


def hub_file(source: str, names: Sequence[str]) -> Path:
    """Return the first of the files `names` that a repository has; fetch it where it is not in the cache.

    Args:
        source: ``hf-hub:owner/name`` or ``hf-hub:owner/name@revision``.
        names: in the repository.

    Raises:
        ValueError: `source` is nothing of the kind.
        RuntimeError: it could not be fetched, or the repository has none of them.
    """
    repository, _, revision = source.split(":", 1)[1].strip("/").partition("@")
    if repository.count("/") != 1:
        raise ValueError(
            f"a repository of the Hugging Face hub is hf-hub:owner/name or hf-hub:owner/name@revision, "
            f"got {shown(source)}"
        )
    try:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import (
            EntryNotFoundError,
            LocalEntryNotFoundError,
            RepositoryNotFoundError,
            RevisionNotFoundError,
        )
    except ImportError as error:
        raise RuntimeError("hf-hub: needs the package huggingface_hub, which is not installed") from error
    unreachable: Exception | None = None
    for name in names:
        try:
            # Where the hub was not reached once, the other file may be in the cache; no more retries.
            return Path(
                hf_hub_download(
                    repository,
                    name,
                    revision=revision or None,
                    local_files_only=unreachable is not None,
                )
            )
        except LocalEntryNotFoundError as error:
            unreachable = error
        except EntryNotFoundError:
            pass
        except (RepositoryNotFoundError, RevisionNotFoundError) as error:
            raise RuntimeError(
                f"the Hugging Face hub has no {repository}{f' at {revision}' if revision else ''}, or it is "
                "not open to you"
            ) from error
        except Exception as error:
            if not is_connection_error(error):
                raise
            unreachable = error
    if unreachable is not None:
        raise RuntimeError(
            f"{repository} could not be fetched from the Hugging Face hub, nor is it in its cache "
            f"({type(unreachable).__name__}). {_OFFLINE}"
        ) from unreachable
    raise RuntimeError(
        f"{repository} on the Hugging Face hub has no {' and no '.join(names)}: if it has the file "
        "under another name, download it and give its path"
    )
