"""The most probable classes, by their names or numbers."""

from __future__ import annotations

import torch

from evit_ext.visualize.class_names import most_probable


def test_most_probable() -> None:
    probabilities = torch.tensor([0.25, 0.5, 0.125, 0.125])
    assert most_probable(probabilities, None, 2) == [("class 1", 0.5), ("class 0", 0.25)]
    assert most_probable(probabilities, list("abcd"))[0] == ("b", 0.5)
    assert len(most_probable(probabilities, None)) == 4 and most_probable(None, None) == []
