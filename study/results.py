"""The results of runs: a small JSON file each, which is committed."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from evit_ext._util.files import replacing
from study.plan import Plan


class Results:
    """The results in a folder.

    Args:
        folder: it is made if it is not there.
        plan: what they must be results of.
    """

    def __init__(self, folder: Path, plan: Plan) -> None:
        self._folder, self._plan = folder, plan

    @property
    def speed(self) -> Path:
        """Where the speed of the networks is."""
        return self._folder / "speed.json"

    def path(self, name: str, seed: int) -> Path:
        """Return where the result of a run is."""
        return self._folder / f"{name}.{seed}.json"

    def get(self, name: str, seed: int) -> dict[str, Any] | None:
        """Return the result of a run, None if it was not run.

        Raises:
            ValueError: it was run with other settings than the plan's, or is no JSON.
        """
        path = self.path(name, seed)
        if not path.exists():
            return None
        try:
            result: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path} is damaged: {error}; remove it, and it is run again") from error
        expected = self._plan.settings(name)
        if result.get("settings") != expected:
            where = ", ".join(_different(result.get("settings") or {}, expected))
            raise ValueError(
                f"{path} is of a run with other settings than the plan's ({where}): remove it, and it is run "
                "again, or give the arm another name"
            )
        return result

    def put(self, result: Mapping[str, Any]) -> None:
        """Write a result."""
        self._folder.mkdir(parents=True, exist_ok=True)
        with replacing(self.path(result["arm"], result["seed"])) as file:
            file.write(json.dumps(result, indent=1, sort_keys=True) + "\n")

    def check_precision(self, names: Iterable[str]) -> None:
        """Raise ValueError where runs of these arms computed in different precisions."""
        found = {result["machine"]["precision"] for name in names for result in self.of(name).values()}
        if len(found) > 1:
            raise ValueError(
                f"runs in {' and '.join(sorted(found))} cannot be compared: run those of one again, in the "
                "other precision (--precision)"
            )

    def of(self, name: str) -> dict[int, dict[str, Any]]:
        """Return the results of an arm by seed."""
        found = {seed: self.get(name, seed) for seed in range(self._plan.arms[name].seeds)}
        return {seed: result for seed, result in found.items() if result is not None}


def _different(one: Any, other: Any, path: str = "") -> list[str]:
    """Return the names of the settings that differ."""
    if not isinstance(one, Mapping) or not isinstance(other, Mapping):
        return [] if one == other else [f"{path}: {one!r}, in the plan {other!r}"]
    names = sorted({*one, *other})
    return [
        entry
        for name in names
        for entry in _different(one.get(name), other.get(name), f"{path}.{name}" if path else name)
    ]
