"""The demo: a DeiT and EViTs on cluttered digits, from nothing to figures, in minutes on a CPU."""

from evit_ext.demo.pipeline import Demo
from evit_ext.demo.settings import FULL, QUICK, Settings

__all__ = ["FULL", "QUICK", "Demo", "Settings"]
