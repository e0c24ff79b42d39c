"""The seam of the method: a rule decides how one block of a vision transformer reduces its tokens.

A new rule is a subclass of :class:`Rule`; nothing else has to know it. It answers two questions: from sizes
alone, how many tokens leave (`Rule.num_out`), and for given tokens, which ones (`Rule.plan`).

Notation: B batch, H heads, N tokens, P prefix tokens, K kept patches, M patch tokens that leave, C channels,
D channels per head.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, TypeVar

from torch import Tensor

from evit_ext._util.messages import reason, shown
from evit_ext.tokens.keep_rate import check_keep_rate
from evit_ext.tokens.plan import Plan

#: What a rule may want of the attention; see `Rule.wants`.
WANTED = frozenset({"scores", "keys", "sizes"})

Self = TypeVar("Self", bound="Rule")


class Seen:
    """What a rule sees at a block.

    Attributes:
        num_prefix_tokens: P.
        num_patches: N − P, the patch tokens that enter; fused tokens of earlier stages count.
        num_image_patches: the patch tokens that entered the first stage; None in models whose blocks do not
            hand that on, which are timm's VisionTransformer and those of transformers.
        token_scores: float32 (float64 for float64), [B, N] for all tokens or [B, N − P] for the patch tokens;
            None if the rule does not want scores.
        keys: [B, H, N, D], as attention multiplies them, with norms and rotary embeddings; None if the rule
            does not want them.
        sizes: of how many patches each patch token is made, [B, N − P], float32 (float64 for float64); None
            if each is one, or no rule before wanted sizes.
    """

    def __init__(
        self,
        x: Tensor,
        branch: Tensor | None,
        num_prefix_tokens: int,
        num_patches: int,
        num_image_patches: int | None,
        token_scores: Tensor | None = None,
        keys: Tensor | None = None,
        sizes: Tensor | None = None,
    ) -> None:
        self._x = x
        self._branch = branch
        self.num_prefix_tokens = num_prefix_tokens
        self.num_patches = num_patches
        self.num_image_patches = num_image_patches
        self.token_scores = token_scores
        self.keys = keys
        self.sizes = sizes

    @property
    def batch(self) -> int:
        """B."""
        return self._x.shape[0]

    @property
    def device(self) -> Any:
        """The device of the tokens."""
        return self._x.device

    @property
    def scores(self) -> Tensor:
        """The scores of the patch tokens, [B, N − P].

        How much attention each receives: from the class token, the mean over heads, or, in models without a
        class token, from all tokens on average. A predictor's or an oracle's opinion may take their place.
        """
        assert self.token_scores is not None, "the rule does not want scores: see Rule.wants"
        return self.token_scores[:, self.token_scores.shape[1] - self.num_patches :]

    @property
    def tokens(self) -> Tensor:
        """The tokens [B, N, C], the residual stream after attention; computed when first asked for."""
        if self._branch is not None:
            self._x, self._branch = self._x + self._branch, None
        return self._x

    def with_scores(self, scores: Tensor) -> Seen:
        """Return the same with other scores, [B, N − P] or [B, N]."""
        return Seen(
            self._x,
            self._branch,
            self.num_prefix_tokens,
            self.num_patches,
            self.num_image_patches,
            scores,
            self.keys,
            self.sizes,
        )


class Rule:
    """How one block reduces its tokens.

    Subclasses are frozen dataclasses: their fields are the rule's settings. Naming a subclass makes it known
    to configurations and saved models::

        @dataclass(frozen=True)
        class EverySecond(Rule, name="every-second"):
            def num_out(self, num_patches, num_image_patches):
                return (num_patches + 1) // 2

            def plan(self, seen):
                kept = torch.arange(0, seen.num_patches, 2, device=seen.device)
                return Plan(kept.expand(seen.batch, -1), seen.num_patches)

        evit_ext.apply(vit, rule=EverySecond())
    """

    #: The name under which configurations and saved models know the rule.
    name: ClassVar[str] = ""

    #: Whether it draws random numbers, so that two forwards differ.
    draws: ClassVar[bool] = False

    #: Whether training may lower its keep rate step by step: not if a loss holds the model to the rate.
    has_schedule: ClassVar[bool] = True

    #: The address of the paper it is from.
    paper: ClassVar[str | None] = None

    #: Whether every patch has a token that stands for it afterwards: dropped ones are fused or merged, not
    #: lost.
    fuses: bool = False

    #: Whether the attention of the blocks that follow adds the logarithm of a token's size to its logits; the
    #: rule must want "sizes".
    proportional: bool = False

    def __init_subclass__(cls, name: str | None = None, **arguments: Any) -> None:
        super().__init_subclass__(**arguments)
        cls.name = cls.__name__ if name is None else name
        if name is not None:
            _NAMED[name] = cls

    def wants(self) -> frozenset[str]:
        """Return what the rule must see besides the tokens: any of "scores", "keys" and "sizes".

        By default nothing. A rule that merges tokens wants their sizes, which are then carried through all
        blocks.
        """
        return frozenset()

    def num_out(self, num_patches: int, num_image_patches: int | None) -> int:
        """Return M, how many patch tokens leave, fused tokens included.

        Known from sizes alone: exported programs, CUDA graphs and budgets need it.

        Args:
            num_patches: patch tokens that enter the block.
            num_image_patches: patch tokens that entered the first stage; see :class:`Seen`.
        """
        raise NotImplementedError

    def num_kept(self, num_patches: int, num_image_patches: int | None) -> int:
        """Return K, how many of the patch tokens go on as tokens of their own; by default all that leave.

        A rule that makes a token of several must say so here. If K is all of them, the block does nothing.
        """
        return self.num_out(num_patches, num_image_patches)

    def plan(self, seen: Seen) -> Plan:
        """Return which token stands for which after the block. It may be asked to keep all of them."""
        raise NotImplementedError

    def settings(self) -> dict[str, Any]:
        """Return the settings as JSON can hold them, of which ``type(rule)(**settings)`` makes the rule.

        Raises:
            TypeError: it is no dataclass, but has settings of its own.
        """
        if dataclasses.is_dataclass(self):
            return dataclasses.asdict(self)
        if vars(self):
            raise TypeError(f"the rule {self.name} must be a dataclass, or define settings(), to be saved")
        return {}

    def describe(self) -> str:
        """Return what becomes of the patches that are not kept, to follow "what is not kept is"."""
        return "fused" if self.fuses else "dropped"

    @property
    def title(self) -> str:
        """What people call it, in tables."""
        return self.name

    @property
    def score_meaning(self) -> str | None:
        """What the scores in a picture are; None where they are the attention that patches receive."""
        return None

    def shown_scores(self, scores: Tensor) -> Tensor:
        """Return scores as a picture shows them."""
        return scores

    @property
    def keep_rate(self) -> float | None:
        """The share of the patch tokens that a stage keeps, in (0, 1]; None if the rule has none."""
        return None

    def with_keep_rate(self: Self, keep_rate: float) -> Self:
        """Return the same rule with another keep rate.

        Raises:
            ValueError: the rule has no keep rate.
        """
        raise ValueError(f"the rule {self.name} has no keep rate: apply it again with other settings")

    def in_turn(self: Self, rules: list[Self]) -> list[Self]:
        """Return the rules of all stages, given each with its own settings, where one depends on others."""
        return rules


class KeepRateRule(Rule):
    """A rule that keeps a share of the patch tokens; its subclasses have a field ``keep_rate``."""

    keep_rate: float = 0.7

    def __post_init__(self) -> None:
        # As Python's number, whatever a scheduler gave; the dataclass is frozen.
        object.__setattr__(self, "keep_rate", check_keep_rate(self.keep_rate))

    def with_keep_rate(self: Self, keep_rate: float) -> Self:
        """Return the same rule with another keep rate."""
        return dataclasses.replace(self, keep_rate=keep_rate)  # type: ignore[type-var]


_NAMED: dict[str, type[Rule]] = {}


def named_rules() -> list[str]:
    """Return the names of all rules that are known, sorted."""
    return sorted(_NAMED)


def rule_class(name: str) -> type[Rule]:
    """Return the rule of a name.

    Raises:
        ValueError: no rule of that name is known.
    """
    if name not in _NAMED:
        raise ValueError(
            f"there is no rule {shown(name)}: expected one of {', '.join(named_rules())}; if it is your own, "
            "import the module that defines it first"
        )
    return _NAMED[name]


def make_rule(name: str, settings: Mapping[str, Any]) -> Rule:
    """Return the rule of a name with these settings.

    Raises:
        TypeError, ValueError: a setting is wrong.
    """
    cls = rule_class(name)
    try:
        return cls(**settings)
    except TypeError as error:
        raise ValueError(f"the rule {name} does not take these settings: {reason(error)}") from error


def rules_by_name(
    name: str, keep_rate: float | Sequence[float] | None, settings: Mapping[str, Any]
) -> Rule | list[Rule]:
    """Return the rule of a name, or a list of one for each of several keep rates.

    Args:
        name: of the rule.
        keep_rate: None is the rule's own; for a rule without a keep rate it must be None or 1.
        settings: the others.

    Raises:
        TypeError, ValueError: as :func:`make_rule`; or the rule has no keep rate, and one is given.
    """
    if keep_rate is None or (keep_rate == 1 and not issubclass(rule_class(name), KeepRateRule)):
        return make_rule(name, settings)
    if not issubclass(rule_class(name), KeepRateRule):
        raise ValueError(f"the rule {name} has no keep rate, got {shown(keep_rate)}")
    if isinstance(keep_rate, (list, tuple)):
        return [make_rule(name, {**settings, "keep_rate": rate}) for rate in keep_rate]
    return make_rule(name, {**settings, "keep_rate": keep_rate})
