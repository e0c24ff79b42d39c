"""The version of this package, as it is installed."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

try:
    VERSION = version("evit_ext")
except PackageNotFoundError:  # run from a source tree that is not installed
    VERSION = "0+unknown"
