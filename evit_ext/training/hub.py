"""Whether a model's pretrained weights can be had, answered within seconds."""

from __future__ import annotations

import threading
import urllib.error
import urllib.request
from typing import Any

import torch

from evit_ext.models.by_name import create_dense

#: Seconds that the answer may take.
PATIENCE = 5.0


def missing_weights(model: str, model_args: dict[str, Any], patience: float = PATIENCE) -> str:
    """Return why the pretrained weights of a model cannot be had; "" if they are cached or the hub answers.

    The hub's own client tries again for more than a minute.

    Args:
        model: its name.
        model_args: its arguments.
        patience: seconds to wait for an answer.

    Raises:
        TypeError, ValueError: the model cannot be built.
    """
    with torch.device("meta"):
        built: Any = create_dense(model, **model_args)
    cfg = getattr(built, "pretrained_cfg", None) or {}
    if cfg.get("file"):
        return ""
    if not cfg.get("hf_hub_id") and not cfg.get("url"):
        return f"{model} has no pretrained weights"
    return _unreachable(cfg, patience)


def _unreachable(cfg: Any, patience: float) -> str:
    try:
        from huggingface_hub import constants, hf_hub_url, try_to_load_from_cache
    except ImportError:
        return "the package huggingface_hub is not installed"
    repository = cfg.get("hf_hub_id")
    if repository:
        names = [cfg.get("hf_hub_filename") or "model.safetensors", "pytorch_model.bin"]
        if any(isinstance(try_to_load_from_cache(repository, name), str) for name in names):
            return ""
        if constants.HF_HUB_OFFLINE:
            return "the hub's client is set to offline, and they are not in its cache"
        address = hf_hub_url(repository, names[0])
    else:
        address = cfg["url"]
    answers: list[str] = []
    # In a thread, because a name server that does not answer knows no timeout.
    thread = threading.Thread(target=_ask, args=(address, patience, answers), daemon=True)
    thread.start()
    thread.join(patience)
    return answers[0] if answers else f"no answer within {patience:g} s"


def _ask(address: str, patience: float, answers: list[str]) -> None:
    try:
        request = urllib.request.Request(address, method="HEAD")
        with urllib.request.urlopen(request, timeout=patience):
            answers.append("")
    except urllib.error.HTTPError as error:
        # It answers; whether it lets us have them, the client finds out.
        answers.append("" if error.code < 500 else f"the server answered {error.code}")
    except (OSError, ValueError) as error:
        answers.append(f"{type(error).__name__}: {getattr(error, 'reason', error)}")
