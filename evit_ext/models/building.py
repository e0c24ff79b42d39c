"""What building the models has in common: tokens that reorganise, features, errors of a missing network."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

from torch import nn

from evit_ext._util.messages import shown
from evit_ext.patching.applying import apply

Model = TypeVar("Model", bound=nn.Module)


def reorganizing(
    model_class: type[Model], keep_rate: float | Sequence[float], drop_loc: Sequence[int] | None, fuse: bool
) -> Callable[..., Model]:
    """Return what builds a `model_class` and calls :func:`evit_ext.apply` on it at once.

    At once, because timm's ``features_only`` cuts off the blocks behind the last feature and wraps what is
    left: the blocks that reorganise are those of the whole model.
    """

    def build(**arguments: Any) -> Model:
        return apply(model_class(**arguments), keep_rate, drop_loc, fuse)

    return build


def feature_settings(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return what timm's ``features_only`` does unless told otherwise: the same as for timm's own ViTs.

    Args:
        arguments: of timm's ``build_model_with_cfg``.

    Raises:
        ValueError: `arguments` ask for another class than timm's FeatureGetterNet.
    """
    if arguments.get("feature_cls", "getter") != "getter":
        raise ValueError(
            "feature_cls must be 'getter', as others would see the tokens that are left and not all patches, "
            f"got {shown(arguments['feature_cls'])}"
        )
    # A new dict each time, as timm changes it.
    return {"out_indices": 3, "feature_cls": "getter"}


@contextmanager
def explaining_missing_network(pretrained: bool, what: str) -> Iterator[None]:
    """Raise a RuntimeError if `pretrained` weights cannot be fetched; `what` says which, and from where."""
    try:
        yield
    except Exception as error:
        if pretrained and is_connection_error(error):
            raise RuntimeError(
                f"{what} ({type(error).__name__}). Without a network, use pretrained=False and load a file "
                "with evit_ext.load_checkpoint"
            ) from error
        raise


def is_connection_error(error: Exception) -> bool:
    """Return whether `error` says that a network, or what is behind it, could not be reached."""
    # The hub's client has changed its HTTP library, and with it the class of its errors, more than once.
    libraries = ("huggingface_hub", "httpx", "httpcore", "requests", "urllib")
    if type(error).__module__.startswith(libraries):
        return True
    # What the operating system says about the network; what it says about files is passed on as it is.
    about_files = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)
    is_full = isinstance(error, OSError) and error.errno == errno.ENOSPC
    return isinstance(error, OSError) and not isinstance(error, about_files) and not is_full
