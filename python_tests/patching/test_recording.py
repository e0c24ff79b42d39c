"""record_tokens: what is recorded, and that nothing stays behind."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from itertools import pairwise
from typing import Any

import pytest
import torch

import evit_ext

pytestmark = pytest.mark.usefixtures("one_thread")


def images(batch: int = 3, seed: int = 0) -> torch.Tensor:
    return torch.randn(batch, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


def test_shapes_dtypes_and_order(small_vit: Any, device: torch.device) -> None:
    vit = evit_ext.apply(small_vit(reg_tokens=2).to(device), (0.7, 0.9, 0.5))
    with evit_ext.record_tokens(vit) as record:
        assert record.kept == [] and record.scores == []
        vit(images().to(device))
    # 16 patches keep 12; 12 and the fused one are 13, which keep 12; again 13, which keep 7.
    assert [tuple(kept.shape) for kept in record.kept] == [(3, 12), (3, 12), (3, 7)]
    assert [tuple(scores.shape) for scores in record.scores] == [(3, 16), (3, 13), (3, 13)]
    for kept, scores in zip(record.kept, record.scores, strict=True):
        assert kept.dtype == torch.int64 and scores.dtype == torch.float32
        assert not scores.requires_grad and kept.device.type == scores.device.type == device.type
        for row in kept.tolist():
            patches = [patch for patch in row if patch >= 0]
            assert row == patches + [-1] * (len(row) - len(patches))
            assert patches == sorted(set(patches)) and max(patches) < 16
    for earlier, later in pairwise(record.kept):
        for row, before in zip(later.tolist(), earlier.tolist(), strict=True):
            assert set(row) - {-1} <= set(before)


def test_fused_tokens_are_followed(
    small_vit: Any, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the scores set by hand, the kept patches can be read off."""
    # In float64 scores are class_attention's on every device: elsewhere attention_with_scores may give them.
    vit = evit_ext.apply(small_vit(dtype=torch.float64).to(device), (0.25, 0.8, 0.5))
    first = torch.tensor([0.1] + [0.9 if patch in (3, 5, 11, 14) else 0.01 for patch in range(16)])
    # Patches 3, 5, 11, 14 and a fused token, of which all but 11 are kept.
    second = torch.tensor([0.1, 0.5, 0.6, 0.2, 0.7, 0.8])
    # Patches 3, 5, 14 and two fused tokens, of which 5 and the fused ones are kept.
    third = torch.tensor([0.1, 0.0, 0.9, 0.3, 0.8, 0.7])
    rows = iter([row.to(device) for row in (first, second, third)])
    monkeypatch.setattr(evit_ext.ops, "class_attention", lambda q, k: next(rows).repeat(len(q), 1))
    with evit_ext.record_tokens(vit) as record:
        vit(images(2).double().to(device))
    assert record.kept[0].tolist() == [[3, 5, 11, 14]] * 2
    assert record.kept[1].tolist() == [[3, 5, 14, -1]] * 2
    assert record.kept[2].tolist() == [[5, -1, -1]] * 2
    assert torch.equal(record.scores[1].cpu(), second[1:].repeat(2, 1))


def test_scores_are_class_attention(small_vit: Any, device: torch.device) -> None:
    vit = evit_ext.apply(small_vit(reg_tokens=1, dtype=torch.float64).to(device), 0.5, drop_loc=[0])
    x = images().double().to(device)
    with evit_ext.record_tokens(vit) as record:
        vit(x)
    block = vit.blocks[0]
    x = block.norm1(vit._pos_embed(vit.patch_embed(x)))
    q, k, _ = block.attn.qkv(x).reshape(3, 18, 3, 2, 12).permute(2, 0, 3, 1, 4)
    attention = (q @ k.transpose(2, 3) * 12**-0.5).softmax(dim=-1)[:, :, 0].mean(dim=1)
    torch.testing.assert_close(record.scores[0], attention[:, 2:])
    best = attention[:, 2:].topk(8, dim=1).indices.sort(dim=1).values
    assert torch.equal(record.kept[0], best)


def test_stage_where_nothing_happens(small_vit: Any, device: torch.device) -> None:
    vit, x = small_vit().to(device), images().to(device)
    expected = vit(x)
    evit_ext.apply(vit, (1.0, 0.5, 1.0))
    with evit_ext.record_tokens(vit) as record:
        logits = vit(x)
    assert record.kept[0].tolist() == [list(range(16))] * 3
    assert [tuple(kept.shape) for kept in record.kept] == [(3, 16), (3, 8), (3, 9)]
    assert record.kept[2][:, -1].tolist() == [-1] * 3
    assert torch.equal(record.kept[2][:, :-1], record.kept[1])
    assert [scores.shape[1] for scores in record.scores] == [16, 16, 9]
    assert not torch.equal(logits, expected)
    evit_ext.set_keep_rate(vit, 1.0)
    with evit_ext.record_tokens(vit):
        assert torch.equal(vit(x), expected)


def test_recording_does_not_change_the_output(small_vit: Any, device: torch.device) -> None:
    vit, x = evit_ext.apply(small_vit().to(device)), images().to(device)
    expected = vit(x)
    with evit_ext.record_tokens(vit):
        assert torch.equal(vit(x), expected)


def test_a_forward_replaces_the_one_before(small_vit: Any, device: torch.device) -> None:
    vit = evit_ext.apply(small_vit().to(device))
    with evit_ext.record_tokens(vit) as record:
        vit(images(5, seed=1).to(device))
        first = record.kept
        vit(images(2).to(device))
        assert [kept.shape[0] for kept in first] == [5, 5, 5]
        assert [kept.shape[0] for kept in record.kept] == [2, 2, 2]
        evit_ext.set_keep_rate(vit, 0.5)
        vit(images(2).to(device))
    assert [kept.shape[1] for kept in record.kept] == [8, 5, 3]
    vit(images(4).to(device))
    assert record.kept[0].shape[0] == 2


def test_gradient_checkpointing_leaves_the_record_whole(small_vit: Any, device: torch.device) -> None:
    vit, x = evit_ext.apply(small_vit().to(device)).train(), images().to(device)
    with evit_ext.record_tokens(vit) as expected:
        vit(x)
    vit.set_grad_checkpointing()
    with evit_ext.record_tokens(vit) as record:
        vit(x).sum().backward()
    for a, b in zip(record.kept, expected.kept, strict=True):
        assert torch.equal(a, b)


def test_nested(small_vit: Any, device: torch.device) -> None:
    vit = evit_ext.apply(small_vit().to(device))
    with evit_ext.record_tokens(vit) as outer:
        vit(images(1).to(device))
        with evit_ext.record_tokens(vit) as inner:
            vit(images(2).to(device))
        assert outer.kept[0].shape[0] == inner.kept[0].shape[0] == 2
        vit(images(3).to(device))
    assert (outer.kept[0].shape[0], inner.kept[0].shape[0]) == (3, 2)
    assert all(block.recorders == () for block in vit.blocks[1:])


def test_an_exception_leaves_the_model_clean(small_vit: Any) -> None:
    vit = evit_ext.apply(small_vit())
    with pytest.raises(RuntimeError, match="on purpose"), evit_ext.record_tokens(vit):
        raise RuntimeError("on purpose")
    assert all(block.recorders == () for block in vit.blocks[1:])


def test_removed_inside_the_context(small_vit: Any, device: torch.device) -> None:
    vit = evit_ext.apply(small_vit().to(device))
    with evit_ext.record_tokens(vit) as record:
        evit_ext.remove(vit)
        vit(images().to(device))
    assert record.kept == []


def test_the_model_does_not_keep_the_record(small_vit: Any) -> None:
    vit = evit_ext.apply(small_vit())
    with evit_ext.record_tokens(vit) as record:
        vit(images())
        copied = copy.deepcopy(vit)
        pickled = pickle.dumps(vit)
    assert all(block.recorders == () for block in copied.blocks[1:])
    assert all(block.recorders == () for block in pickle.loads(pickled).blocks[1:])
    reference = weakref.ref(record)
    del record
    gc.collect()
    assert reference() is None


def test_recording_a_compiled_model(small_vit: Any, device: torch.device) -> None:
    vit, x = evit_ext.apply(small_vit().to(device)), images().to(device)
    torch.compiler.reset()
    compiled = torch.compile(vit, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        compiled(x)
        with evit_ext.record_tokens(compiled) as record:
            compiled(x)
        with evit_ext.record_tokens(vit) as expected:
            vit(x)
    for a, b in zip(record.kept, expected.kept, strict=True):
        assert torch.equal(a, b)


def test_model_that_was_not_applied(small_vit: Any) -> None:
    with pytest.raises(ValueError, match="call evit_ext.apply first"), evit_ext.record_tokens(small_vit()):
        pass


def test_counting_does_not_touch_the_record(small_vit: Any, device: torch.device) -> None:
    vit = evit_ext.apply(small_vit().to(device), keep_rate=0.6)
    with evit_ext.record_tokens(vit) as record:
        vit(images(2).to(device))
        evit_ext.count_macs(vit)
    assert [kept.device.type for kept in record.kept] == [device.type] * 3
    assert all(len(kept) == 2 for kept in record.kept)


def test_recomputation_for_the_gradient_is_no_forward(small_vit: Any, device: torch.device) -> None:
    vit = evit_ext.apply(small_vit().to(device), keep_rate=0.6).train()
    vit.set_grad_checkpointing()
    with evit_ext.record_tokens(vit) as record:
        loss = vit(images(2).to(device)).sum()
        vit(images(5).to(device))
        loss.backward()
    assert [len(kept) for kept in record.kept] == [5] * 3


def test_a_forward_that_stops_early_leaves_no_older_stages(small_vit: Any, device: torch.device) -> None:
    vit = evit_ext.apply(small_vit().to(device), keep_rate=0.6)
    with evit_ext.record_tokens(vit) as record:
        vit(images(3).to(device))
        vit.forward_intermediates(
            images(1).to(device), indices=[1], stop_early=True, output_fmt="NLC", intermediates_only=True
        )
    assert [len(kept) for kept in record.kept] == [1]
