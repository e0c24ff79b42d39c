"""Data that ships with the package: real handwritten digits, plain and among clutter; no download."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from evit_ext.data.public import *  # noqa: F403
else:
    from evit_ext._util.lazy import lazily

    __getattr__ = lazily(__name__, "evit_ext.data.public")


def __dir__() -> list[str]:
    from evit_ext.data import public

    return sorted({*globals(), *public.__all__})
