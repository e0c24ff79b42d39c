"""Eval mode, and back."""

from __future__ import annotations

import pytest
from torch import nn

from evit_ext._util.modes import eval_mode


def test_each_module_has_its_own_mode_again() -> None:
    model = nn.Sequential(nn.Dropout(), nn.BatchNorm1d(2))
    model[1].eval()
    with pytest.raises(KeyError), eval_mode(model):
        assert not any(module.training for module in model.modules())
        raise KeyError
    assert model.training and model[0].training and not model[1].training
