"""Where the work of a model is: parameters, tokens and multiply-accumulates of each of its layers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from typing import Any, NamedTuple

from timm.utils.model import unwrap_model
from torch import Tensor, nn

from evit_ext.cost.macs import run_counting
from evit_ext.patching.block import ReorganizingBlock
from evit_ext.patching.families import locate
from evit_ext.tokens.stage import Stage


class LayerCost(NamedTuple):
    """What a part of a model costs for one image; a line of :func:`layer_costs`.

    Attributes:
        name: as in ``model.named_modules()``, such as "blocks.3"; "" for everything outside the parts: the
            class token, the position embedding, products outside of modules.
        parameters: their number.
        macs: multiply-accumulates, as :func:`evit_ext.count_macs` counts them.
        tokens_in: tokens that enter a block, prefix and fused tokens included; None for other parts.
        tokens_out: tokens that leave it.
        patches: patch tokens among which a reorganising block, or a predictor of a DynamicViT, chooses,
            fused tokens of earlier stages included; None for other parts.
        kept: how many of these it keeps.
        fused: how many of these it fuses into one token; 0 if the others are dropped or all are kept.
    """

    name: str
    parameters: int
    macs: int
    tokens_in: int | None = None
    tokens_out: int | None = None
    patches: int | None = None
    kept: int | None = None
    fused: int | None = None


def layer_costs(model: nn.Module, img_size: int | tuple[int, int] | None = None) -> list[LayerCost]:
    """Return what each part of a model costs, in the order in which they run.

    Parts are the blocks, the predictors of a DynamicViT, and the modules before and after them that have
    parameters or do work. Parameters and multiply-accumulates add up to those of the whole model. As in
    :func:`evit_ext.count_macs`, nothing is computed, and the model is not changed. The model's mode matters:
    a DynamicViT in training drops no tokens and runs its blocks' layers itself, so that their work is listed
    under the name "".

    Args:
        model: a vision transformer of timm or transformers, an EViT or not, or a DynamicViT; wrapped
            (DistributedDataParallel, torch.compile) or not.
        img_size: height and width, or one number for both; default the size the model was built for.

    Returns:
        A :class:`LayerCost` for each part, in the order in which the parts run.

    Raises:
        ValueError: the model has no known blocks, or `img_size` is needed because the model does not say
            what size it was built for.

    Example:
        >>> layers = evit_ext.layer_costs(evit_ext.models.deit_small(keep_rate=0.7))
        >>> layers[4]
        LayerCost(name='blocks.3', parameters=1774464, macs=311151360, tokens_in=197, tokens_out=140,
        patches=196, kept=138, fused=58)
    """
    inner: Any = unwrap_model(model)
    located = locate(inner)
    blocks = set() if located is None else set(located.blocks)
    if not blocks:
        raise ValueError(
            f"{type(inner).__name__} has no blocks that are known: expected a vision transformer"
        )
    parts = dict(_parts(inner, blocks))
    calls: dict[nn.Module, tuple[int | None, int | None]] = {}  # tokens in and out, in the order of the calls

    def watch(part: nn.Module, args: tuple[Any, ...], named: dict[str, Any], out: Any) -> None:
        calls.setdefault(part, (_num_tokens((*args, *named.values())), _num_tokens(out)))

    with ExitStack() as hooks:
        for part in parts.values():
            hooks.callback(part.register_forward_hook(watch, with_kwargs=True).remove)
        counter = run_counting(inner, img_size)
    macs = {
        # Without the name of the model's class, with which the counter's begin.
        name.partition(".")[2]: sum(flops.values()) // 2
        for name, flops in counter.get_flop_counts().items()
    }
    parameters = _parameters(inner, parts)
    stages = _stages(inner, calls)
    turns = {part: turn for turn, part in enumerate(calls)}
    costs = []
    for name, part in sorted(parts.items(), key=lambda item: turns.get(item[1], len(turns))):
        if parameters[name] or macs.get(name):
            tokens = calls.get(part, (None, None)) if part in blocks else (None, None)
            stage = stages.get(part, (None, None, None))
            costs.append(LayerCost(name, parameters[name], macs.get(name, 0), *tokens, *stage))
    rest = counter.get_total_flops() // 2 - sum(cost.macs for cost in costs)
    if rest or parameters[""]:
        costs.insert(0, LayerCost("", parameters[""], rest))
    return costs


def _parts(module: nn.Module, blocks: set[nn.Module], name: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Yield the blocks, and the largest modules besides that hold none, with their names."""
    for key, child in module.named_children():
        full = f"{name}.{key}" if name else key
        # A list is never called itself; what it holds is.
        if child not in blocks and (isinstance(child, nn.ModuleList) or blocks & set(child.modules())):
            yield from _parts(child, blocks, full)
        else:
            yield full, child


def _num_tokens(values: Any) -> int | None:
    """Return N of the first tensor [B, N, C] among the values; None where there is none."""
    among = values if isinstance(values, (tuple, list)) else (values,)
    first = next((value for value in among if isinstance(value, Tensor)), None)
    return first.shape[1] if first is not None and first.dim() == 3 else None


def _stages(
    model: Any, calls: Mapping[nn.Module, tuple[int | None, ...]]
) -> dict[nn.Module, tuple[int, int, int]]:
    """Return for each stage among how many patches it chooses, how many it keeps and how many it fuses.

    In training, predictors keep all patches, and so have no line of their own.
    """
    found: dict[nn.Module, tuple[int, int, int]] = {}
    image_patches = 0
    for part, (tokens, *_) in calls.items():
        if not isinstance(part, Stage) or tokens is None:
            continue
        patches = tokens  # a predictor sees patches only
        if isinstance(part, ReorganizingBlock):
            patches -= part.num_prefix_tokens
        elif model.training:
            continue
        image_patches = image_patches or patches
        kept = part.rule.num_kept(patches, image_patches)
        fuses = part.rule.num_out(patches, image_patches) > kept
        found[part] = (patches, kept, patches - kept if fuses else 0)
    return found


def _parameters(model: nn.Module, parts: Mapping[str, nn.Module]) -> dict[str, int]:
    """Return the number of parameters in each part, and those in none under ""; shared ones count once."""
    owner = {module: name for name, part in parts.items() for module in part.modules()}
    counts = dict.fromkeys(("", *parts), 0)
    for name, parameter in model.named_parameters():
        counts[owner.get(model.get_submodule(name.rpartition(".")[0]), "")] += parameter.numel()
    return counts
