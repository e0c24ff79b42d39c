"""The plan of a study, read from YAML: which networks are trained how, and what is compared.

An arm is one way to get a network; with a seed it is a run. Seeds fix the initial weights and the training
images, so runs of different arms with the same seed are pairs.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

import yaml

from evit_ext.data.cluttered_digits import Difficulty
from evit_ext.tokens.rule import rules_by_name
from evit_ext.training import Recipe

Entry = TypeVar("Entry")


@dataclass(frozen=True, kw_only=True)
class Task:
    """The images: cluttered digits, whose test canvases are the same for every run.

    Attributes:
        canvas_size, patch_size: in pixels.
        difficulty: ranges of :class:`evit_ext.data.cluttered_digits.Difficulty`; those left out are "easy"'s.
        train_images: canvases an epoch; they are new ones in every epoch.
        easy_epochs: at the beginning of networks from scratch, without distractors.
        test_images, test_seed: canvases of the test split.
    """

    canvas_size: int = 64
    patch_size: int = 8
    difficulty: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    train_images: int = 12800
    easy_epochs: int = 0
    test_images: int = 10000
    test_seed: int = 1797

    def make_difficulty(self, easy: bool = False) -> Difficulty:
        """Return the ranges as the data set takes them; those of easy epochs have no distractors."""
        ranges: dict[str, Any] = {name: tuple(values) for name, values in self.difficulty.items()}
        return Difficulty(**{**ranges, "num_distractors": (0, 0)} if easy else ranges)


@dataclass(frozen=True, kw_only=True)
class Network:
    """The vision transformer of all arms: a DeiT of this shape, in timm's code."""

    embed_dim: int
    depth: int
    num_heads: int


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One way to get a network.

    Attributes:
        recipe: name of a recipe of the plan; None trains nothing.
        start: name of the arm whose weights, of the same seed, it starts from; None starts from scratch.
        model: "vit", which is reorganised where there is a keep rate, or "dynamicvit".
        keep_rate: of every stage; None leaves it to `rule_args`, and without these keeps all tokens.
        rule: name of a rule; by default EViT's.
        rule_args: settings of the rule besides its keep rate, such as ``fuse_token``.
        drop_loc: numbers of the blocks that reorganise; by default those at the quarters of the depth.
        oracle: name of the arm whose network, of the same seed, chooses the patches during training.
        canvas_size: instead of the task's, with the task's patch size.
        seeds: how many runs, from seed 0.
    """

    recipe: str | None = None
    start: str | None = None
    model: str = "vit"
    keep_rate: float | None = None
    rule: str = "evit"
    rule_args: Mapping[str, Any] = field(default_factory=dict)
    drop_loc: tuple[int, ...] | None = None
    oracle: str | None = None
    canvas_size: int | None = None
    seeds: int = 5

    @property
    def reduces(self) -> bool:
        """Whether tokens become fewer."""
        return self.keep_rate is not None or bool(self.rule_args)


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Two arms, compared seed by seed.

    Attributes:
        arm, with_arm: names of arms.
        value: entry of the results that is compared.
        margin: a difference within ± this is none that matters, in the value's unit; None asks for the sign.
    """

    arm: str
    with_arm: str
    value: str = "top1"
    margin: float | None = None


@dataclass(frozen=True, kw_only=True)
class Question:
    """What is asked, what was expected before the runs, and the comparisons that answer it.

    Attributes:
        answer: one sentence or two, written after runs. What ``{arm - with_arm}`` in it stands for, the
            verdict and the interval of one of the comparisons, the page takes from the results.
        paper: what the paper says of it, and whether this agrees, in the same form.
    """

    title: str
    ask: str
    hypothesis: str
    arms: tuple[str, ...]
    comparisons: tuple[Comparison, ...] = ()
    answer: str = ""
    paper: str = ""

    def filled(self, text: str, found: Callable[[Comparison], str]) -> str:
        """Return `text` with each ``{arm - with_arm}`` replaced by what `found` says of that comparison.

        Raises:
            ValueError: the question has no such comparison.
        """
        by_name = {f"{one.arm} - {one.with_arm}": one for one in self.comparisons}

        def replaced(match: re.Match[str]) -> str:
            if match[1] not in by_name:
                raise ValueError(f"no comparison is {match[1]!r}; there are {', '.join(by_name)}")
            return found(by_name[match[1]])

        return re.sub(r"{([^{}]*)}", replaced, text)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """See the module; :func:`read_plan` makes one."""

    name: str
    task: Task
    network: Network
    recipes: Mapping[str, Recipe]
    arms: Mapping[str, Arm]
    questions: Mapping[str, Question]
    dropped: tuple[str, ...] = ()

    def runs(self) -> Iterator[tuple[str, int]]:
        """Yield arm and seed of every run: all of seed 0 first; what a run starts from before it."""
        order: list[str] = []
        for name in self.arms:
            self._with_what_it_needs(name, order)
        for seed in range(max(arm.seeds for arm in self.arms.values())):
            for name in order:
                if seed < self.arms[name].seeds:
                    yield name, seed

    def needs(self, name: str) -> list[str]:
        """Return the arms whose weights an arm needs."""
        arm = self.arms[name]
        return [needed for needed in (arm.start, arm.oracle) if needed is not None]

    def settings(self, name: str) -> dict[str, Any]:
        """Return all that a run of the arm depends on, besides its seed and the code: values for JSON."""
        arm = self.arms[name]
        described = {entry: value for entry, value in _plain(asdict(arm)).items() if entry != "seeds"}
        described["recipe"] = None if arm.recipe is None else _plain(asdict(self.recipes[arm.recipe]))
        needed = {needed: self.settings(needed) for needed in self.needs(name)}
        return {
            "task": _plain(asdict(self.task)),
            "network": asdict(self.network),
            "arm": described,
            "needs": needed,
        }

    def _with_what_it_needs(self, name: str, order: list[str], path: tuple[str, ...] = ()) -> None:
        if name in path:
            raise ValueError(f"arms start from each other in a circle: {' -> '.join((*path, name))}")
        for needed in self.needs(name):
            self._with_what_it_needs(needed, order, (*path, name))
        if name not in order:
            order.append(name)


def read_plan(path: Path) -> Plan:
    """Read a plan.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is no plan; the message says where and what was expected.
    """
    entries = yaml.safe_load(path.read_text(encoding="utf-8"))
    try:
        plan = _make(Plan, {"name": path.stem, **_mapping("the plan", entries)}, "the plan")
        _check(plan)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error
    return plan


def _make(kind: type[Entry], entries: Any, where: str) -> Entry:
    """Return a dataclass of `entries`, and the dataclasses in it."""
    entries = dict(_mapping(where, entries))
    known = {entry.name for entry in fields(kind)}  # type: ignore[arg-type]
    if unknown := sorted(set(entries) - known):
        raise ValueError(f"{where}: there is no entry {unknown[0]!r}; expected {', '.join(sorted(known))}")
    parts: dict[str, Any] = {}
    for name, value in entries.items():
        place = f"{where}, {name}"
        if kind is Plan and name in ("task", "network"):
            value = _make(Task if name == "task" else Network, value, place)
        elif kind is Plan and name in ("recipes", "arms", "questions"):
            inner: Any = {"recipes": Recipe, "arms": Arm, "questions": Question}[name]
            value = {key: _make(inner, one, f"{place}, {key}") for key, one in _mapping(place, value).items()}
        elif name == "comparisons":
            value = tuple(_make(Comparison, one, place) for one in value)
        elif isinstance(value, list):
            value = tuple(value)
        parts[name] = value
    try:
        return kind(**parts)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: {error}") from error


def _mapping(where: str, value: Any) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise ValueError(f"{where}: expected names with values, got {type(value).__name__}")
    return value


def _check(plan: Plan) -> None:
    plan.task.make_difficulty()
    for name in plan.arms:
        if missing := [needed for needed in plan.needs(name) if needed not in plan.arms]:
            raise ValueError(f"arm {name}: there is no arm {missing[0]!r}")
    list(plan.runs())  # no circle
    for name, arm in plan.arms.items():
        for needed in plan.needs(name):
            if plan.arms[needed].seeds < arm.seeds:
                raise ValueError(f"arm {name} has {arm.seeds} seeds, and {needed}, which it needs, has fewer")
        if arm.recipe is not None and arm.recipe not in plan.recipes:
            raise ValueError(f"arm {name}: there is no recipe {arm.recipe!r}")
        if arm.recipe is None and arm.start is None:
            raise ValueError(f"arm {name}: nothing is trained; give a recipe, or start from another arm")
        try:
            rules_by_name(arm.rule, arm.keep_rate, arm.rule_args)
        except (TypeError, ValueError) as error:
            raise ValueError(f"arm {name}: {error}") from error
        if arm.model not in ("vit", "dynamicvit"):
            raise ValueError(f"arm {name}: model must be vit or dynamicvit, got {arm.model!r}")
    for key, question in plan.questions.items():
        named = [*question.arms]
        for comparison in question.comparisons:
            named += [comparison.arm, comparison.with_arm]
        if missing := [name for name in named if name not in plan.arms]:
            raise ValueError(f"question {key}: there is no arm {missing[0]!r}")
        try:
            question.filled(question.answer + question.paper, lambda comparison: "")
        except ValueError as error:
            raise ValueError(f"question {key}: {error}") from error


def _plain(value: Any) -> Any:
    """Return `value` as JSON gives it back: tuples as lists."""
    if isinstance(value, Mapping):
        return {name: _plain(one) for name, one in value.items()}
    return [_plain(one) for one in value] if isinstance(value, tuple | list) else value
