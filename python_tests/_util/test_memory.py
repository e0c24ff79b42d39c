"""Memory in use."""

from __future__ import annotations

import torch

from evit_ext._util.memory import peak_memory


def test_peak_memory() -> None:
    weights = torch.ones(64 * 2**20)
    assert weights.nbytes < peak_memory(torch.device("cpu")) < 2**40
