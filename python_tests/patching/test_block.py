"""What a reorganising block computes: against the plain model, and against a slow EViT."""

from __future__ import annotations

import copy
import io
from functools import partial
from inspect import signature
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from slow_evit import slow_evit
from timm.layers import DropPath
from torch.utils._python_dispatch import TorchDispatchMode

import evit_ext
from evit_ext.ops import library
from evit_ext.patching.attention import attend
from evit_ext.patching.families.timm_attention import TIMM_ATTENTION

pytestmark = pytest.mark.usefixtures("one_thread")


def images(batch: int = 3, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, 3, 32, 32, dtype=dtype, generator=generator)


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_keep_rate_one_is_the_original_to_the_last_bit(
    variant: Any, training: bool, gradients: bool, device: torch.device
) -> None:
    arguments = {} if not training else {"drop_path_rate": 0.3, "attn_drop_rate": 0.2, "proj_drop_rate": 0.1}
    vit = variant(**arguments).to(device).train(training)
    x = images().to(device)
    with torch.set_grad_enabled(gradients):
        torch.manual_seed(3)
        expected = vit(x)
        evit_ext.apply(vit, keep_rate=1.0)
        torch.manual_seed(3)
        assert torch.equal(vit(x), expected)


@pytest.mark.parametrize("fuse", [True, False])
def test_agrees_with_the_slow_implementation(variant: Any, fuse: bool, device: torch.device) -> None:
    drop_loc, rates = (0, 1, 3), (0.8, 0.7, 0.45)
    slow = variant(dtype=torch.float64)
    expected, expected_kept, expected_scores = slow_evit(
        slow, images(dtype=torch.float64), rates, drop_loc, fuse
    )
    vit = evit_ext.apply(variant(dtype=torch.float64), rates, drop_loc, fuse).to(device)
    with evit_ext.record_tokens(vit) as record:
        logits = vit(images(dtype=torch.float64).to(device))
    torch.testing.assert_close(logits.cpu(), expected, rtol=1e-10, atol=1e-11)
    for kept, scores, slow_kept, slow_scores in zip(
        record.kept, record.scores, expected_kept, expected_scores, strict=True
    ):
        assert torch.equal(kept.cpu().sort(dim=1).values, slow_kept.sort(dim=1).values)
        torch.testing.assert_close(scores.cpu(), slow_scores, rtol=1e-10, atol=1e-12)

    loss_weights = torch.randn(expected.shape, dtype=torch.float64)
    (expected * loss_weights).sum().backward()
    (logits.cpu() * loss_weights).sum().backward()
    # Some gradients are zero but for rounding: that of k_norm.bias, which shifts all logits of a softmax.
    atol = 1e-12 * max(p.grad.abs().max().item() for p in slow.parameters() if p.grad is not None)
    for (name, parameter), other in zip(vit.named_parameters(), slow.parameters(), strict=True):
        if other.grad is None:  # unused; a parameter unused here only would stop DistributedDataParallel
            assert parameter.grad is None, name
        else:
            torch.testing.assert_close(parameter.grad.cpu(), other.grad, rtol=1e-9, atol=atol)


def test_scores_carry_gradient(small_vit: Any, device: torch.device) -> None:
    """Through the fused token the last layers' loss reaches the class token's query."""
    vit = evit_ext.apply(small_vit(depth=1, global_pool="avg", fc_norm=False), 0.5, drop_loc=[0]).to(device)
    qkv = vit.blocks[0].attn.qkv.weight
    detached = copy.deepcopy(vit)
    block = detached.blocks[0]
    branch = block.attention_branch

    def without_gradient(*args: Any) -> Any:
        attended = branch(*args)
        return attended._replace(scores=attended.scores.detach())

    block.attention_branch = without_gradient
    x = images().to(device)
    gradient, without = (
        torch.autograd.grad(m(x)[:, 0].sum(), m.blocks[0].attn.qkv.weight)[0] for m in (vit, detached)
    )
    assert gradient.shape == qkv.shape
    assert (gradient[:24] - without[:24]).abs().max() > 1e-4


def test_number_of_kept_tokens(small_vit: Any, device: torch.device) -> None:
    """ceil(keep_rate * patches), and nothing happens where that is all of them."""
    vit = evit_ext.apply(small_vit().to(device), (0.95, 0.5, 0.3))
    sizes = []
    for block in vit.blocks:
        block.register_forward_hook(lambda module, args, out: sizes.append(out.shape[1]))
    vit(images().to(device))
    # 16 patches; 0.95 * 16 = 15.2 keeps 16; 8 and the fused one are 9; 0.3 * 9 = 2.7 keeps 3.
    assert sizes == [17, 17, 1 + 8 + 1, 1 + 3 + 1]


@pytest.mark.parametrize("keep_rate", [1e-9, 0.01, 1 / 16])
def test_keeps_at_least_one_patch(small_vit: Any, keep_rate: float, device: torch.device) -> None:
    vit = evit_ext.apply(small_vit().to(device), keep_rate, drop_loc=[3], fuse_token=False)
    assert vit.forward_features(images().to(device)).shape == (3, 2, 24)


def test_batch_of_none_and_one(small_vit: Any, device: torch.device) -> None:
    vit = evit_ext.apply(small_vit(dtype=torch.float64).to(device))
    assert vit(images(0, torch.float64).to(device)).shape == (0, 5)
    x = images(3, torch.float64).to(device)
    torch.testing.assert_close(vit(x[:1]), vit(x)[:1])


def test_attention_dropout_in_training_only(small_vit: Any, device: torch.device) -> None:
    vit = evit_ext.apply(small_vit(attn_drop_rate=0.5, depth=1).to(device), 0.5, drop_loc=[0])
    x = images().to(device)
    assert torch.equal(vit(x), vit(x))
    vit.train()
    assert not torch.equal(vit(x), vit(x))


def test_drop_path_drops_both_halves(small_vit: Any, device: torch.device) -> None:
    vit = evit_ext.apply(small_vit(depth=1).to(device), 0.5, drop_loc=[0], fuse_token=False).train()
    vit.blocks[0].drop_path1 = vit.blocks[0].drop_path2 = DropPath(1.0)
    x = torch.randn(2, 17, 24).to(device)
    with evit_ext.record_tokens(vit) as record:
        out = vit.blocks[0](x)
    index = torch.nn.functional.pad(record.kept[0] + 1, (1, 0))
    assert torch.equal(out, evit_ext.ops.gather_tokens(x, index))


class _Shapes(TorchDispatchMode):
    """Collects the shapes of all tensors that operators return."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, torch.Tensor):
                self.shapes.add(tuple(tensor.shape))
        return out


def test_no_attention_map_is_formed(small_vit: Any, device: torch.device) -> None:
    vit, x = small_vit(depth=1).to(device), images().to(device)
    with _Shapes() as slow, torch.no_grad():
        slow_evit(vit, x, [0.5], [0])
    evit_ext.apply(vit, 0.5, drop_loc=[0])
    with _Shapes() as fast, torch.no_grad():
        vit(x)
    assert (3, 2, 17, 17) in slow.shapes
    assert not any(shape[-2:] == (17, 17) for shape in fast.shapes)


def test_keys_and_query_are_read_in_place(
    small_vit: Any, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[torch.Tensor] = []
    operator = evit_ext.ops.class_attention

    def spy(q: torch.Tensor, k: torch.Tensor, scale: float | None = None) -> torch.Tensor:
        seen.extend((q, k))
        return operator(q, k, scale)

    monkeypatch.setattr(evit_ext.ops, "class_attention", spy)
    attend(TIMM_ATTENTION, small_vit().to(device).blocks[0].attn, torch.randn(2, 17, 24).to(device))
    q, k = seen
    assert q.untyped_storage().data_ptr() == k.untyped_storage().data_ptr()
    assert k.untyped_storage().nbytes() == 4 * 2 * 17 * 3 * 24


def test_hooks_on_the_block_go_on(small_vit: Any, device: torch.device) -> None:
    vit, x = small_vit().to(device), images().to(device)
    seen: list[str] = []
    handle = vit.blocks[2].register_forward_hook(lambda block, args, out: seen.append(type(block).__name__))
    evit_ext.apply(vit, keep_rate=0.5)(x)
    evit_ext.remove(vit)(x)
    assert seen == ["ReorganizingViTBlock", "Block"]
    handle.remove()
    vit(x)
    assert len(seen) == 2


def test_masks_are_refused_where_tokens_are_dropped(small_vit: Any, device: torch.device) -> None:
    vit, x = small_vit().to(device), images().to(device)
    if "is_causal" not in signature(vit.forward).parameters:
        pytest.skip("this timm passes no masks")
    mask = torch.zeros(17, 17, device=device)
    mask[:, 3] = -1e9
    expected = vit(x, attn_mask=mask)
    evit_ext.apply(vit, 1.0)
    assert torch.equal(vit(x, attn_mask=mask), expected)
    evit_ext.set_keep_rate(vit, 0.7)
    with pytest.raises(NotImplementedError, match="takes no attention mask"):
        vit(x, attn_mask=mask)


def test_autocast(small_vit: Any, device: torch.device) -> None:
    vit = evit_ext.apply(small_vit().to(device), 0.7)
    x = images().to(device)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        logits = vit(x)
    logits.float().sum().backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in vit.parameters())
    # Another choice of patches would be a much larger difference than bfloat16's.
    torch.testing.assert_close(logits.float(), vit(x), rtol=0.1, atol=0.1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision(small_vit: Any, dtype: torch.dtype, device: torch.device) -> None:
    vit = evit_ext.apply(small_vit(dtype=dtype).to(device), 0.7)
    logits = vit(images(dtype=dtype).to(device))
    assert logits.dtype == dtype
    assert torch.isfinite(logits).all()


def test_gradient_checkpointing(small_vit: Any, device: torch.device) -> None:
    gradients, x = [], images(dtype=torch.float64).to(device)
    for checkpointing in (False, True):
        torch.manual_seed(1)
        vit = evit_ext.apply(small_vit(drop_path_rate=0.2, dtype=torch.float64).to(device), 0.6).train()
        vit.set_grad_checkpointing(checkpointing)
        torch.manual_seed(2)
        vit(x).square().sum().backward()
        gradients.append([parameter.grad for parameter in vit.parameters()])
    for plain, checkpointed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, checkpointed)


@pytest.mark.parametrize("training", [False, True])
def test_compile_with_dynamic_batch(small_vit: Any, training: bool, device: torch.device) -> None:
    vit = evit_ext.apply(small_vit(depth=3, dtype=torch.float64).to(device), 0.6, drop_loc=[0, 1]).train(
        training
    )
    torch.compiler.reset()
    graphs = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(vit, fullgraph=True, backend=graphs)
    for batch in (2, 3, 5):
        x = images(batch, torch.float64).to(device)
        logits = compiled(x)
        torch.testing.assert_close(logits, vit(x))
        if training:
            compiled_gradients = torch.autograd.grad(logits.sum(), list(vit.parameters()))
            gradients = torch.autograd.grad(vit(x).sum(), list(vit.parameters()))
            for a, b in zip(compiled_gradients, gradients, strict=True):
                torch.testing.assert_close(a, b)
    assert graphs.frame_count == 2  # one for the first batch size, one for all others
    if training:
        return
    evit_ext.set_keep_rate(vit, 0.3)
    torch.testing.assert_close(compiled(x), vit(x))


def test_compile_with_inductor(small_vit: Any, device: torch.device) -> None:
    vit = evit_ext.apply(small_vit(depth=2), 0.6, drop_loc=[0]).to(device)
    torch.compiler.reset()
    x = images().to(device)
    torch.testing.assert_close(torch.compile(vit, fullgraph=True)(x), vit(x), rtol=1e-4, atol=1e-5)


def test_export_with_dynamic_batch(small_vit: Any, device: torch.device) -> None:
    vit = evit_ext.apply(small_vit().to(device), 0.6)
    program = torch.export.export(
        vit, (images(2).to(device),), dynamic_shapes=({0: torch.export.Dim("batch", min=1)},)
    )
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    exported = torch.export.load(file).module()
    for batch in (1, 2, 5):
        x = images(batch).to(device)
        torch.testing.assert_close(exported(x), vit(x), rtol=1e-4, atol=1e-5)
    if device.type in library.KERNEL_DEVICES:
        names = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
        assert {"evit.class_attention.default", "evit.reorganize_tokens.default"} <= names


def test_norms_of_other_kinds_are_adopted(small_vit: Any, device: torch.device) -> None:
    vit = small_vit(norm_layer=partial(torch.nn.LayerNorm, eps=1e-3), dtype=torch.float64).to(device)
    x = images(dtype=torch.float64).to(device)
    expected = slow_evit(vit, x, (0.5, 0.5, 0.5), (1, 2, 3))[0]
    torch.testing.assert_close(evit_ext.apply(vit, 0.5)(x), expected, rtol=1e-10, atol=1e-11)
