"""The method without any model: rules that reduce tokens, and which patch each token is.

:func:`evit_ext.apply` takes any :class:`Rule`: those here, or one of your own.
"""

from evit_ext.tokens.evit import EViT
from evit_ext.tokens.plan import Plan
from evit_ext.tokens.random_selection import RandomSelection
from evit_ext.tokens.rule import KeepRateRule, Rule, Seen, make_rule, named_rules
from evit_ext.tokens.tome import ToMe
from evit_ext.tokens.trail import TokenTrail

__all__ = [
    "EViT",
    "KeepRateRule",
    "Plan",
    "RandomSelection",
    "Rule",
    "Seen",
    "ToMe",
    "TokenTrail",
    "make_rule",
    "named_rules",
]
