"""The shares of patches that survive, against loops and dice."""

from __future__ import annotations

import pytest
import torch

from evit_ext.demo.survival import object_survival, random_survival


def test_object_survival() -> None:
    kept = [torch.tensor([[0, 2, 5], [1, 3, 4]]), torch.tensor([[0, 5], [3, -1]])]
    objects = torch.tensor(
        [[True, True, False, False, False, True], [False, False, False, True, True, False]]
    )
    shares = object_survival(kept, objects)
    assert shares.dtype == torch.float64
    torch.testing.assert_close(shares, torch.tensor([[2 / 3, 2 / 3], [1.0, 0.5]], dtype=torch.float64))
    objects[1] = False
    with pytest.raises(ValueError, match="at least one object patch"):
        object_survival(kept, objects)


def test_random_survival_against_dice() -> None:
    """Draw as an EViT with keep rate 0.7 and fusion would if its scores were random."""
    stages = [(45, 64), (33, 46), (24, 34)]
    images, num_patches = 4000, 64
    ids = torch.arange(num_patches).expand(images, -1)
    kept = []
    for num_kept, candidates in stages:
        assert ids.shape[1] == candidates
        chosen = torch.rand(ids.shape).argsort(dim=1)[:, :num_kept]
        kept.append(ids.gather(1, chosen))
        ids = torch.nn.functional.pad(kept[-1], (0, 1), value=-1)
    objects = torch.zeros(images, num_patches, dtype=torch.bool)
    objects[:, 10:20] = True
    measured = object_survival(kept, objects).mean(dim=0).tolist()
    expected = random_survival([k for k, _ in stages], [m for _, m in stages])
    # 4,000 images with 10 patches each: a standard error of at most 0.0025.
    assert measured == pytest.approx(expected, abs=0.01)
    assert expected[0] == 45 / 64


def test_random_survival_errors() -> None:
    with pytest.raises(ValueError, match="2 stages keep tokens, 1 have candidates"):
        random_survival([3, 2], [4])
    for kept in (0, 5):
        with pytest.raises(ValueError, match=f"cannot keep {kept} of 4"):
            random_survival([kept], [4])
