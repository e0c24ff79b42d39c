"""ToMe in the models of transformers, against the slow implementation."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from huggingface_models import LINES, build, images, output
from slow_huggingface import SlowToMe

import evit_ext
from evit_ext.tokens import ToMe

pytestmark = pytest.mark.usefixtures("one_thread")

DROP_LOC, MERGED = (0, 1, 3), (3, 4, 1)


@pytest.mark.parametrize("name", LINES)
def test_agrees_in_models_of_transformers(name: str) -> None:
    model = build(name, torch.float64)
    slow = SlowToMe(name, copy.deepcopy(model), MERGED, DROP_LOC)
    x = images(2, torch.float64)
    expected = slow(x)
    evit_ext.apply(model, rule=[ToMe(r=r) for r in MERGED], drop_loc=DROP_LOC)
    with evit_ext.record_tokens(model) as record:
        found = output(model, x)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=2e-13)
    for kept, groups in zip(record.kept, slow.stages, strict=True):
        assert kept.tolist() == [[group[0] for group in image] for image in groups]
    for out in (found, expected):
        out.square().sum().backward()
    for (parameter_name, parameter), other in zip(
        model.named_parameters(), slow.model.parameters(), strict=True
    ):
        if other.grad is not None:
            torch.testing.assert_close(parameter.grad, other.grad, rtol=1e-10, atol=1e-12, msg=parameter_name)


def test_attention_functions() -> None:
    model = evit_ext.apply(build("ViT"), rule=ToMe(r=4), drop_loc=[0, 1])
    expected = output(model, images())
    model.config._attn_implementation = "eager"
    torch.testing.assert_close(output(model, images()), expected, rtol=1e-4, atol=1e-4)


def test_attention_functions_without_a_bias_are_refused() -> None:
    from evit_ext.patching.families.huggingface_attention import check_takes_bias

    attention = SimpleNamespace(config=SimpleNamespace(_attn_implementation="flash_attention_2"))
    with pytest.raises(RuntimeError, match="'flash_attention_2' of transformers takes no bias for each key"):
        check_takes_bias(attention)
