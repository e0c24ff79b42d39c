"""FSDP of both kinds around blocks and attentions, in a group of one process."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

import evit_ext

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore")]


@pytest.fixture(scope="module", autouse=True)
def group(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    file: Path = tmp_path_factory.mktemp("group") / "store"
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def vit(qk_norm: bool) -> Any:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"img_size": 64, "patch_size": 8, "embed_dim": 48, "depth": 4, "num_heads": 3}
    return VisionTransformer(**sizes, num_classes=10, qk_norm=qk_norm).eval()


def images() -> Tensor:
    return torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def shard_1(model: Any, level: str) -> Any:
    for number, block in enumerate(model.blocks):
        if level == "block":
            model.blocks[number] = FullyShardedDataParallel(block, device_id=torch.device("cpu"))
        else:
            block.attn = FullyShardedDataParallel(block.attn, device_id=torch.device("cpu"))
    return FullyShardedDataParallel(model, device_id=torch.device("cpu"))


def shard_2(model: Any, level: str) -> Any:
    mesh = init_device_mesh("cpu", (1,))
    for block in model.blocks:
        for part in (block,) if level == "block" else (block.attn, block.mlp):
            fully_shard(part, mesh=mesh)
    return fully_shard(model, mesh=mesh)


@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize("level", ["block", "attention"])
@pytest.mark.parametrize("shard", [shard_1, shard_2], ids=["FSDP1", "FSDP2"])
def test_sharded_parts_of_blocks(shard: Any, level: str, qk_norm: bool) -> None:
    model = evit_ext.apply(vit(qk_norm), 0.6)
    whole = copy.deepcopy(model)
    sharded = shard(model, level)
    torch.testing.assert_close(sharded(images()), whole(images()), rtol=1e-5, atol=1e-6)
    sharded.train()(images()).square().sum().backward()
    evit_ext.set_keep_rate(sharded, 0.3)
    with evit_ext.record_tokens(sharded) as record:
        sharded(images())
    assert [kept.shape[1] for kept in record.kept] == [20, 7, 3]
    if level == "block":
        with pytest.raises(RuntimeError, match="undo that first|call evit_ext.remove before wrapping"):
            evit_ext.remove(sharded)


@pytest.mark.parametrize("level", ["block", "attention"])
@pytest.mark.parametrize("shard", [shard_1, shard_2], ids=["FSDP1", "FSDP2"])
def test_sharded_dynamicvit_in_training(shard: Any, level: str) -> None:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"img_size": 64, "patch_size": 8, "embed_dim": 48, "depth": 4, "num_heads": 3}
    model = evit_ext.models.dynamicvit_tiny(**sizes, drop_loc=(1, 2)).train()
    outputs = []
    for part in (copy.deepcopy(model), shard(model, level)):
        torch.manual_seed(1)
        outputs.append(part(images()))
        outputs[-1].logits.square().sum().backward()
    torch.testing.assert_close(outputs[1].logits, outputs[0].logits, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(outputs[1].mask, outputs[0].mask)
