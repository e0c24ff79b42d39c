"""The functions that build the models by name: one signature for all, written once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, Protocol, TypeVar, overload

import timm
from timm.models._features import FeatureGetterNet
from torch import nn

Model = TypeVar("Model", bound=nn.Module)
Model_co = TypeVar("Model_co", bound=nn.Module, covariant=True)


class NamedModel(Protocol[Model_co]):
    """A function that builds a model: what type checkers know of those of :func:`named_model`."""

    @overload
    def __call__(
        self,
        keep_rate: float | Sequence[float] = ...,
        fuse_token: bool = ...,
        drop_loc: Sequence[int] | None = ...,
        img_size: int | tuple[int, int] = ...,
        num_classes: int = ...,
        pretrained: bool = ...,
        *,
        features_only: Literal[True],
        **timm_kwargs: Any,
    ) -> FeatureGetterNet: ...

    @overload
    def __call__(
        self,
        keep_rate: float | Sequence[float] = ...,
        fuse_token: bool = ...,
        drop_loc: Sequence[int] | None = ...,
        img_size: int | tuple[int, int] = ...,
        num_classes: int = ...,
        pretrained: bool = ...,
        **timm_kwargs: Any,
    ) -> Model_co: ...


def named_model(
    registered: str,
    model_class: type[Model],
    *,
    keep_rate: float = 0.7,
    drop_loc: Sequence[int] | None = (3, 6, 9),
    img_size: int = 224,
) -> Callable[[Callable[[], None]], NamedModel[Model]]:
    """Make a function that builds a model of one that has nothing but a name and a docstring.

    Args:
        registered: the model's name in timm's registry.
        model_class: what the function returns.
        keep_rate, drop_loc, img_size: the function's defaults.

    Returns:
        A decorator.
    """
    default_keep_rate, default_drop_loc, default_img_size = keep_rate, drop_loc, img_size

    def decorate(named: Callable[[], None]) -> NamedModel[Model]:
        # The signature in full, and not *args: help(), completion and errors of arguments show it.
        def build(
            keep_rate: float | Sequence[float] = default_keep_rate,
            fuse_token: bool = True,
            drop_loc: Sequence[int] | None = default_drop_loc,
            img_size: int | tuple[int, int] = default_img_size,
            num_classes: int = 1000,
            pretrained: bool = False,
            **timm_kwargs: Any,
        ) -> Any:
            model = timm.create_model(
                registered,
                pretrained=pretrained,
                keep_rate=keep_rate,
                fuse_token=fuse_token,
                drop_loc=drop_loc,
                img_size=img_size,
                num_classes=num_classes,
                **timm_kwargs,
            )
            assert isinstance(model, (model_class, FeatureGetterNet))
            return model

        # Not functools.wraps, whose __wrapped__ would show the signature of the function without arguments.
        build.__name__, build.__qualname__ = named.__name__, named.__qualname__
        build.__module__, build.__doc__ = named.__module__, named.__doc__
        build.__annotations__["return"] = model_class
        return build

    return decorate
