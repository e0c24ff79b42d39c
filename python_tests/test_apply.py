"""apply, remove and set_keep_rate on timm models, against the plain model and against a slow EViT."""

from __future__ import annotations

import copy
import io
import pickle
from functools import partial
from inspect import signature
from typing import Any

import pytest
import timm
import torch
import torch._dynamo.testing
from slow_evit import slow_evit
from timm.layers import DropPath
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import Attention, ParallelScalingBlock, ResPostBlock, VisionTransformer
from torch.utils._python_dispatch import TorchDispatchMode

import evit_ext
from evit_ext.block import ReorganizingBlock, attend

pytestmark = pytest.mark.usefixtures("one_thread")

VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "registers": {"reg_tokens": 3},
    "dinov2": {"reg_tokens": 2, "no_embed_class": True, "init_values": 0.5},
    "qk_norm": {"qk_norm": True, "init_values": 0.7},
    "scale_norm": {"scale_attn_norm": True, "scale_mlp_norm": True},
    "clip": {"pre_norm": True, "qkv_bias": False},
    "average_pool": {"global_pool": "avg"},
    "attention_pool": {"global_pool": "map"},
    "distilled": {"cls": VisionTransformerDistilled},
    "gated": {"gated": True},  # set below: timm's VisionTransformer does not pass it on
    "dynamic": {"dynamic_img_size": True},
}


@pytest.fixture(params=VARIANTS)
def variant(request: pytest.FixtureRequest, small_vit: Any) -> Any:
    """A function that builds the same small model of one kind each time; arguments override."""

    def build(**arguments: Any) -> Any:
        torch.manual_seed(1)
        arguments = {**VARIANTS[request.param], **arguments}
        gated = arguments.pop("gated", False)
        if not set(arguments) - {"cls", "dtype"} <= set(signature(VisionTransformer).parameters):
            pytest.skip("this timm is too old for it")
        vit = small_vit(**arguments)
        if gated:
            if not hasattr(vit.blocks[0].attn, "gate"):
                pytest.skip("this timm is too old for it")
            for block in vit.blocks:
                block.attn.gate = torch.nn.Linear(24, 24).to(vit.cls_token.dtype)
        return vit

    return build


def images(batch: int = 3, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, 3, 32, 32, dtype=dtype, generator=generator)


# --- what is computed


@pytest.mark.parametrize("training", [False, True])
def test_keep_rate_one_is_the_original_to_the_last_bit(
    variant: Any, training: bool, device: torch.device
) -> None:
    arguments = {} if not training else {"drop_path_rate": 0.3, "attn_drop_rate": 0.2, "proj_drop_rate": 0.1}
    vit = variant(**arguments).to(device).train(training)
    x = images().to(device)
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


def test_scores_carry_gradient(small_vit: Any) -> None:
    """Through the fused token the last layers' loss reaches the class token's query."""
    vit = evit_ext.apply(small_vit(depth=1, global_pool="avg", fc_norm=False), 0.5, drop_loc=[0])
    qkv = vit.blocks[0].attn.qkv.weight
    detached = copy.deepcopy(vit)
    block = detached.blocks[0]
    block._attend = lambda attention, x: tuple(
        t if i == 0 else t.detach() for i, t in enumerate(attend(attention, x))
    )
    gradient, without = (
        torch.autograd.grad(m(images())[:, 0].sum(), m.blocks[0].attn.qkv.weight)[0] for m in (vit, detached)
    )
    assert gradient.shape == qkv.shape
    assert (gradient[:24] - without[:24]).abs().max() > 1e-4


def test_number_of_kept_tokens(small_vit: Any) -> None:
    """ceil(keep_rate * patches), and nothing happens where that is all of them."""
    vit = evit_ext.apply(small_vit(), (0.95, 0.5, 0.3))
    sizes = []
    for block in vit.blocks:
        block.register_forward_hook(lambda module, args, out: sizes.append(out.shape[1]))
    vit(images())
    # 16 patches; 0.95 * 16 = 15.2 keeps 16; 8 and the fused one are 9; 0.3 * 9 = 2.7 keeps 3.
    assert sizes == [17, 17, 1 + 8 + 1, 1 + 3 + 1]


@pytest.mark.parametrize("keep_rate", [1e-9, 0.01, 1 / 16])
def test_keeps_at_least_one_patch(small_vit: Any, keep_rate: float) -> None:
    vit = evit_ext.apply(small_vit(), keep_rate, drop_loc=[3], fuse_token=False)
    assert vit.forward_features(images()).shape == (3, 2, 24)


def test_batch_of_none_and_one(small_vit: Any, device: torch.device) -> None:
    vit = evit_ext.apply(small_vit().to(device))
    assert vit(images(0).to(device)).shape == (0, 5)
    x = images(3).to(device)
    torch.testing.assert_close(vit(x[:1]), vit(x)[:1])


def test_attention_dropout_in_training_only(small_vit: Any) -> None:
    vit = evit_ext.apply(small_vit(attn_drop_rate=0.5, depth=1), 0.5, drop_loc=[0])
    assert torch.equal(vit(images()), vit(images()))
    vit.train()
    assert not torch.equal(vit(images()), vit(images()))


def test_drop_path_drops_both_halves(small_vit: Any) -> None:
    vit = evit_ext.apply(small_vit(depth=1), 0.5, drop_loc=[0], fuse_token=False).train()
    vit.blocks[0].drop_path1 = vit.blocks[0].drop_path2 = DropPath(1.0)
    x = torch.randn(2, 17, 24)
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


def test_no_attention_map_is_formed(small_vit: Any) -> None:
    vit = small_vit(depth=1)
    with _Shapes() as slow, torch.no_grad():
        slow_evit(vit, images(), [0.5], [0])
    evit_ext.apply(vit, 0.5, drop_loc=[0])
    with _Shapes() as fast, torch.no_grad():
        vit(images())
    assert (3, 2, 17, 17) in slow.shapes
    assert not any(shape[-2:] == (17, 17) for shape in fast.shapes)


def test_keys_and_query_are_read_in_place(small_vit: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[torch.Tensor] = []
    operator = evit_ext.ops.class_attention

    def spy(q: torch.Tensor, k: torch.Tensor, scale: float | None = None) -> torch.Tensor:
        seen.extend((q, k))
        return operator(q, k, scale)

    monkeypatch.setattr(evit_ext.ops, "class_attention", spy)
    attend(small_vit().blocks[0].attn, torch.randn(2, 17, 24))
    q, k = seen
    assert q.untyped_storage().data_ptr() == k.untyped_storage().data_ptr()
    assert k.untyped_storage().nbytes() == 4 * 2 * 17 * 3 * 24


def test_masks_are_refused_where_tokens_are_dropped(small_vit: Any) -> None:
    vit = small_vit()
    if "is_causal" not in signature(vit.forward).parameters:
        pytest.skip("this timm passes no masks")
    mask = torch.zeros(17, 17)
    mask[:, 3] = -1e9
    expected = vit(images(), attn_mask=mask)
    evit_ext.apply(vit, 1.0)
    assert torch.equal(vit(images(), attn_mask=mask), expected)
    evit_ext.set_keep_rate(vit, 0.7)
    with pytest.raises(NotImplementedError, match="takes no attn_mask"):
        vit(images(), attn_mask=mask)


# --- what is changed


def test_state_dict_is_that_of_timm(variant: Any) -> None:
    vit, plain = variant(), variant()
    before = vit.state_dict()
    parameters = list(vit.parameters())
    assert evit_ext.apply(vit) is vit
    assert list(vit.state_dict()) == list(before)
    assert all(a is b for a, b in zip(vit.parameters(), parameters, strict=True))
    vit.load_state_dict(plain.state_dict())
    plain.load_state_dict(vit.state_dict())


@pytest.mark.parametrize("training", [False, True])
def test_the_mode_stays(small_vit: Any, training: bool) -> None:
    vit = evit_ext.apply(small_vit().train(training))
    assert {module.training for module in vit.modules()} == {training}


def test_only_the_named_blocks_change(small_vit: Any) -> None:
    vit = small_vit()
    blocks = list(vit.blocks)
    evit_ext.apply(vit, drop_loc=[1, 3])
    assert [isinstance(block, ReorganizingBlock) for block in vit.blocks] == [False, True, False, True]
    assert vit.blocks[0] is blocks[0] and vit.blocks[2] is blocks[2]
    assert vit.blocks[1].mlp is blocks[1].mlp and vit.blocks[1].attn is blocks[1].attn


@pytest.mark.parametrize(
    ("depth", "expected"),
    [(12, [3, 6, 9]), (16, [4, 8, 12]), (6, [1, 3, 4]), (4, [1, 2, 3]), (2, [0, 1]), (1, [0])],
)
def test_default_blocks(small_vit: Any, depth: int, expected: list[int]) -> None:
    vit = evit_ext.apply(small_vit(depth=depth))
    assert [i for i, block in enumerate(vit.blocks) if isinstance(block, ReorganizingBlock)] == expected


def test_remove_restores_the_original(variant: Any) -> None:
    vit = variant()
    blocks, keys, expected = list(vit.blocks), list(vit.state_dict()), vit(images())
    evit_ext.apply(vit, 0.5)
    assert not torch.equal(vit(images()), expected)
    assert evit_ext.remove(vit) is vit
    assert all(a is b for a, b in zip(vit.blocks, blocks, strict=True))
    assert list(vit.state_dict()) == keys
    assert torch.equal(vit(images()), expected)
    assert evit_ext.remove(vit) is vit
    evit_ext.apply(vit, 0.5)


def test_remove_keeps_what_happened_in_between(small_vit: Any) -> None:
    vit = evit_ext.apply(small_vit(attn_drop_rate=0.1), 0.5)
    vit.train().double()
    vit.blocks[1].mlp = torch.nn.Identity()
    with torch.no_grad():
        vit.blocks[2].norm1.weight.zero_()
    evit_ext.remove(vit)
    assert all(module.training for module in vit.modules())
    assert isinstance(vit.blocks[1].mlp, torch.nn.Identity)
    assert vit.blocks[2].norm1.weight.abs().sum() == 0
    assert {parameter.dtype for parameter in vit.parameters()} == {torch.float64}
    vit(images(dtype=torch.float64))


def test_set_keep_rate(small_vit: Any) -> None:
    vit = evit_ext.apply(small_vit(), 0.5)
    assert evit_ext.set_keep_rate(vit, 0.8) is vit
    assert torch.equal(vit(images()), evit_ext.apply(_fresh(vit), 0.8)(images()))
    evit_ext.set_keep_rate(vit, (0.9, 1, 0.25))
    assert [block.keep_rate for block in vit.blocks[1:]] == [0.9, 1.0, 0.25]
    assert "keep_rate=0.25, num_prefix_tokens=1, fuse_token=True" in repr(vit)


def _fresh(vit: Any) -> Any:
    return evit_ext.remove(copy.deepcopy(vit))


# --- errors


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"keep_rate": 0}, ValueError, r"keep_rate must be in \(0, 1\], got 0"),
        ({"keep_rate": 1.01}, ValueError, "got 1.01"),
        ({"keep_rate": float("nan")}, ValueError, "got nan"),
        ({"keep_rate": "0.7"}, TypeError, "must be a number in .*, got '0.7'"),
        ({"keep_rate": True}, TypeError, "got True"),
        ({"keep_rate": (0.5, 0.7)}, ValueError, "one number or 3, one for each reorganising block, got 2"),
        ({"keep_rate": (0.5, 0.7, -1)}, ValueError, "got -1"),
        ({"drop_loc": (1, 4)}, ValueError, r"must be in \[0, 4\), the model's blocks, got \(1, 4\)"),
        ({"drop_loc": (-1, 2)}, ValueError, r"got \(-1, 2\)"),
        ({"drop_loc": (2, 1)}, ValueError, r"must be ascending, without repetition, got \(2, 1\)"),
        ({"drop_loc": (1, 1)}, ValueError, r"got \(1, 1\)"),
        ({"drop_loc": ()}, ValueError, "got none"),
        ({"drop_loc": 3}, TypeError, "must be a sequence of block numbers.*got 3"),
        ({"drop_loc": (1, 2.0)}, TypeError, r"got \(1, 2.0\)"),
        ({"drop_loc": "123"}, TypeError, "got '123'"),
    ],
)
def test_argument_errors(
    small_vit: Any, arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    vit = small_vit()
    blocks = list(vit.blocks)
    with pytest.raises(error, match=message):
        evit_ext.apply(vit, **arguments)
    assert all(a is b for a, b in zip(vit.blocks, blocks, strict=True))


def test_numbers_of_other_kinds(small_vit: Any) -> None:
    np = pytest.importorskip("numpy")
    vit = evit_ext.apply(small_vit(), np.float32(0.5), drop_loc=np.array([1, 3]))
    assert [type(block.keep_rate) for block in vit.blocks if hasattr(block, "keep_rate")] == [float, float]
    evit_ext.apply(small_vit(), 1, drop_loc=range(2))


def test_twice(small_vit: Any) -> None:
    vit = evit_ext.apply(small_vit())
    with pytest.raises(ValueError, match="set_keep_rate, or call evit_ext.remove first"):
        evit_ext.apply(vit, drop_loc=[0])


def test_set_keep_rate_errors(small_vit: Any) -> None:
    vit = small_vit()
    with pytest.raises(ValueError, match="VisionTransformer has no block .* call evit_ext.apply first"):
        evit_ext.set_keep_rate(vit, 0.7)
    evit_ext.apply(vit, 0.6)
    with pytest.raises(ValueError, match="got 2"):
        evit_ext.set_keep_rate(vit, 2)
    with pytest.raises(ValueError, match="got 4"):
        evit_ext.set_keep_rate(vit, (0.5, 0.5, 0.5, 0.5))
    assert {block.keep_rate for block in vit.blocks[1:]} == {0.6}


def test_models_that_cannot_be_supported(small_vit: Any) -> None:
    def refuse(model: Any, message: str, error: type[Exception] = ValueError) -> None:
        with pytest.raises(error, match=message):
            evit_ext.apply(model)

    refuse("deit_small", "must be a timm vision transformer, got str", TypeError)
    refuse(torch.nn.Linear(2, 2), "Linear is not supported: expected a vision transformer with its blocks")
    wrapped = torch.nn.Module()
    wrapped.module = small_vit()
    refuse(wrapped, r"pass the model inside the wrapper \(.module\)")
    without = small_vit(class_token=False, global_pool="avg")
    refuse(without, "VisionTransformer is not supported: it has no class token")
    refuse(small_vit(class_token=False, reg_tokens=2, global_pool="avg"), "it has no class token")
    prefix = "block 1 is a timm.models"
    expected = "which is not supported: expected timm.models.vision_transformer.Block"
    refuse(small_vit(block_fn=ResPostBlock), f"{prefix}.vision_transformer.ResPostBlock, {expected}")
    refuse(small_vit(block_fn=ParallelScalingBlock), f"{prefix}.vision_transformer.ParallelScalingBlock")
    arguments = {"depth": 4, "embed_dim": 24, "num_heads": 2}
    refuse(timm.create_model("eva02_tiny_patch14_224", **arguments), f"{prefix}.eva.EvaBlock")
    refuse(timm.create_model("beit_base_patch16_224", **arguments), f"{prefix}.beit.Block, {expected}")

    class Scaled(Attention):
        pass

    vit = small_vit()
    vit.blocks[3].attn = Scaled(24, 2)
    refuse(vit, "the attention of block 3 is a test_apply.Scaled, which is not supported: expected timm")
    assert not any(isinstance(block, ReorganizingBlock) for block in vit.blocks)


# --- what users do with models


def test_copies_are_independent(small_vit: Any) -> None:
    vit = evit_ext.apply(small_vit(), 0.5)
    expected = vit(images())
    copied = copy.deepcopy(vit)
    file = io.BytesIO()
    torch.save(vit, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    unpickled = pickle.loads(pickle.dumps(vit))
    with torch.no_grad():
        for parameter in vit.parameters():
            parameter.zero_()
    for other in (copied, loaded, unpickled):
        assert torch.equal(other(images()), expected)
        # The original block of a copy holds the copy's parameters, not those of the model it came from.
        evit_ext.set_keep_rate(other, 1.0)
        full = other(images())
        evit_ext.remove(other)
        assert not any(isinstance(module, ReorganizingBlock) for module in other.modules())
        assert torch.equal(other(images()), full)
        assert full.abs().sum() > 0


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


def test_gradient_checkpointing(small_vit: Any) -> None:
    gradients = []
    for checkpointing in (False, True):
        torch.manual_seed(1)
        vit = evit_ext.apply(small_vit(drop_path_rate=0.2), 0.6).train()
        vit.set_grad_checkpointing(checkpointing)
        torch.manual_seed(2)
        vit(images()).square().sum().backward()
        gradients.append([parameter.grad for parameter in vit.parameters()])
    for plain, checkpointed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, checkpointed)


@pytest.mark.parametrize("training", [False, True])
def test_compile_with_dynamic_batch(small_vit: Any, training: bool) -> None:
    vit = evit_ext.apply(small_vit(depth=3), 0.6, drop_loc=[0, 1]).train(training)
    torch.compiler.reset()
    graphs = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(vit, fullgraph=True, backend=graphs)
    for batch in (2, 3, 5):
        logits = compiled(images(batch))
        torch.testing.assert_close(logits, vit(images(batch)))
        if training:
            compiled_gradients = torch.autograd.grad(logits.sum(), list(vit.parameters()))
            gradients = torch.autograd.grad(vit(images(batch)).sum(), list(vit.parameters()))
            for a, b in zip(compiled_gradients, gradients, strict=True):
                torch.testing.assert_close(a, b)
    assert graphs.frame_count == 2  # one for the first batch size, one for all others
    if training:
        return
    evit_ext.set_keep_rate(vit, 0.3)
    torch.testing.assert_close(compiled(images(5)), vit(images(5)))


def test_compile_with_inductor(small_vit: Any, device: torch.device) -> None:
    vit = evit_ext.apply(small_vit(depth=2), 0.6, drop_loc=[0]).to(device)
    torch.compiler.reset()
    x = images().to(device)
    torch.testing.assert_close(torch.compile(vit, fullgraph=True)(x), vit(x), rtol=1e-4, atol=1e-5)


def test_export_with_dynamic_batch(small_vit: Any) -> None:
    vit = evit_ext.apply(small_vit(), 0.6)
    program = torch.export.export(vit, (images(2),), dynamic_shapes=({0: torch.export.Dim("batch", min=1)},))
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    exported = torch.export.load(file).module()
    for batch in (1, 2, 5):
        torch.testing.assert_close(exported(images(batch)), vit(images(batch)))
    names = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert {"evit.class_attention.default", "evit.reorganize_tokens.default"} <= names


def test_norms_of_other_kinds_are_adopted(small_vit: Any) -> None:
    vit = small_vit(norm_layer=partial(torch.nn.LayerNorm, eps=1e-3))
    expected = slow_evit(vit, images(), (0.5, 0.5, 0.5), (1, 2, 3))[0]
    torch.testing.assert_close(evit_ext.apply(vit, 0.5)(images()), expected, rtol=1e-4, atol=1e-5)
