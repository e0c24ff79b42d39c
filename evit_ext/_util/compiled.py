"""The compiled module, which registers torch.ops.evit when it is imported."""

import torch  # noqa: F401  # loads the libraries that the compiled module needs

try:
    from evit_ext._C import Snapshot, build_info
except ImportError as error:
    raise ImportError(
        f"the compiled module evit_ext._C cannot be imported ({error}). If Python runs in a clone of the "
        "repository, it finds the sources there instead of the installed package: run it elsewhere, or "
        "install the clone with: pip install --no-build-isolation --editable ."
    ) from error

__all__ = ["Snapshot", "build_info"]
