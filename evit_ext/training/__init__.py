"""Training, thin over timm and torch.distributed; `Run` is all of ``evit train``."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from evit_ext.training.public import *  # noqa: F403
else:
    from evit_ext._util.lazy import lazily

    __getattr__ = lazily(__name__, "evit_ext.training.public")


def __dir__() -> list[str]:
    from evit_ext.training import public

    return sorted({*globals(), *public.__all__})
