"""What was found out about a module, for as long as nobody changes what it depends on."""

from __future__ import annotations

from typing import Any

from torch import nn

from evit_ext._util.compiled import Snapshot

#: The attribute of a module that holds it.
KNOWN = "_evit_known"


class _Known:
    """Findings by name, each with a snapshot of all that it depends on. Copies and saved models have none."""

    def __init__(self, parts: dict[str, Any] | None = None) -> None:
        self.parts = parts
        self.found: dict[str, tuple[Snapshot, Any]] = {}

    def __copy__(self) -> _Known:
        return _Known()

    def __deepcopy__(self, memo: dict[int, Any]) -> _Known:
        return _Known()

    def __reduce__(self) -> tuple[type[_Known], tuple[()]]:
        return _Known, ()


def recall(module: nn.Module, name: str) -> Any:
    """Return what is known of a module under a name; None if nothing is, or it has changed since."""
    known = module.__dict__.get(KNOWN)
    # A replica for nn.DataParallel shares the object, and not its parts.
    if known is None or known.parts is not module._modules:
        return None
    found = known.found.get(name)
    if found is None:
        return None
    snapshot, value = found
    if snapshot.holds():
        return value
    known.found.pop(name, None)
    return None


def keep(module: nn.Module, name: str, parts: list[nn.Module], value: Any) -> None:
    """Keep what was found out about a module; it depends on some of its parts, and on their places."""
    known = module.__dict__.get(KNOWN)
    if known is None or known.parts is not module._modules:
        known = module.__dict__[KNOWN] = _Known(module._modules)
    modules = [one for part in parts for one in part.modules()]
    known.found[name] = Snapshot(modules, [module._modules]), value


def forget(module: nn.Module) -> None:
    """Forget all that is known of a module."""
    module.__dict__.pop(KNOWN, None)
