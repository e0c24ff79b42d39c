"""A model over several processes: each has all of it (DDP), or each has a part of it (FSDP2)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint.state_dict as sharded_state
from timm.utils.model import unwrap_model
from timm.utils.model_ema import ModelEmaV3
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.parallel import DistributedDataParallel

from evit_ext._util.messages import shown
from evit_ext.training.ranks import Ranks

_FULL = sharded_state.StateDictOptions(full_state_dict=True, cpu_offload=True)


def distribute(
    model: nn.Module,
    ranks: Ranks,
    sharding: str = "ddp",
    ema_decay: float | None = None,
    compile: bool = False,
) -> tuple[nn.Module, ModelEmaV3 | None]:
    """Make a model ready for training by all processes, with a moving average of it.

    Args:
        model: the same on every process, on its device.
        ranks: the processes.
        sharding: "ddp": every process has the whole model, its average and the optimizer's state; the
            gradients are averaged. "fsdp": each has a part of all of them, and gathers the weights of a block
            when it computes it. A single process has the whole in either case.
        ema_decay: decay of the moving average; None makes none.
        compile: compile the model with torch.compile, in place.

    Returns:
        The model to train (with DDP a wrapper of it), and timm's moving average, or None.

    Raises:
        ValueError: `sharding` is neither.
    """
    if sharding not in ("ddp", "fsdp"):
        raise ValueError(f"sharding must be 'ddp' or 'fsdp', got {shown(sharding)}")
    # Before it is sharded or compiled: neither can be copied.
    ema = None if ema_decay is None else ModelEmaV3(model, decay=ema_decay)
    if sharding == "fsdp" and ranks.world_size > 1:
        mesh = init_device_mesh(ranks.device.type, (ranks.world_size,))
        for whole in (model, *(() if ema is None else (ema.module,))):
            for block in getattr(whole, "blocks", ()):
                fully_shard(block, mesh=mesh)
            fully_shard(whole, mesh=mesh)
    if compile:
        # A keep rate is a program of its own anyway; see `allow_recompiles`.
        model.compile(dynamic=False)
    if sharding == "ddp" and ranks.world_size > 1:
        devices = None if ranks.device.type == "cpu" else [ranks.device]
        return DistributedDataParallel(model, device_ids=devices, gradient_as_bucket_view=True), ema
    return model, ema


def is_sharded(model: nn.Module) -> bool:
    """Return whether processes have parts of the model (FSDP2)."""
    return isinstance(unwrap_model(model), FSDPModule)


@contextmanager
def gradients_stay(model: nn.Module, stay: bool = True) -> Iterator[None]:
    """Leave gradients where they are, for those of further micro-batches; with `stay` False do nothing."""
    if stay and isinstance(model, DistributedDataParallel):
        with model.no_sync():
            yield
        return
    sharded = unwrap_model(model)
    if not isinstance(sharded, FSDPModule):
        yield
        return
    sharded.set_requires_gradient_sync(not stay)
    yield


def share_buffers(model: nn.Module, ranks: Ranks) -> None:
    """Give every process the first one's buffers, which checkpoints have; every process must call it.

    Running means of batch norms are each process' own: DistributedDataParallel shares them before a forward
    only, FSDP2 and the moving average never.
    """
    if ranks.world_size > 1:
        for buffer in model.buffers():
            dist.broadcast(buffer, src=0)


def whole_state(model: nn.Module) -> dict[str, Any]:
    """Return the state dict; of a sharded model on the first process, on the CPU, and nothing on the others.

    Every process must call it.
    """
    if is_sharded(model):
        return sharded_state.get_model_state_dict(model, options=_FULL)
    return unwrap_model(model).state_dict()


def load_whole_state(model: nn.Module, state: Mapping[str, Any]) -> None:
    """Load what :func:`whole_state` returned on the first process; every process must call it with it."""
    if is_sharded(model):
        options = sharded_state.StateDictOptions(full_state_dict=True)
        sharded_state.set_model_state_dict(model, dict(state), options=options)
    else:
        unwrap_model(model).load_state_dict(state)


def whole_optimizer_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Return the optimizer's state, as :func:`whole_state`."""
    if is_sharded(model):
        return dict(sharded_state.get_optimizer_state_dict(model, optimizer, options=_FULL))
    return optimizer.state_dict()


def load_whole_optimizer_state(
    model: nn.Module, optimizer: torch.optim.Optimizer, state: Mapping[str, Any]
) -> None:
    """Load what :func:`whole_optimizer_state` returned, as :func:`load_whole_state`."""
    if is_sharded(model):
        options = sharded_state.StateDictOptions(full_state_dict=True)
        named = _by_name(model, optimizer, state)
        sharded_state.set_optimizer_state_dict(model, optimizer, named, options=options)
    else:
        optimizer.load_state_dict(dict(state))


def _by_name(model: nn.Module, optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> dict[str, Any]:
    """Return an optimizer's state by the parameters' names; a process that was alone has numbered them."""
    names = {parameter: name for name, parameter in unwrap_model(model).named_parameters()}
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    saved = [key for group in state["param_groups"] for key in group["params"]]
    if not all(isinstance(key, int) for key in saved):
        return dict(state)
    name = {key: names[parameter] for key, parameter in zip(saved, parameters, strict=True)}
    return {
        "state": {name[key]: value for key, value in state["state"].items()},
        "param_groups": [
            {**group, "params": [name[key] for key in group["params"]]} for group in state["param_groups"]
        ],
    }
