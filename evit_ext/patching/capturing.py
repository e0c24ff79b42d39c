"""The forward of a model as one CUDA graph, which a GPU runs without waiting for Python."""

from __future__ import annotations

import threading
from itertools import chain
from operator import is_
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from evit_ext._util.cuda_graphs import capture
from evit_ext.cpu.forward import HOOKS, is_watched
from evit_ext.ops import checks
from evit_ext.tokens.rule import Rule
from evit_ext.tokens.stage import Stage, find_stages

#: Device types that have such graphs.
_DEVICES = frozenset({"cuda"})


class _Module(NamedTuple):
    """What decides about a module's forward, to notice changes by."""

    name: str
    module: nn.Module
    forward: Any
    attributes: dict[str, Any]
    children: tuple[nn.Module | None, ...]
    tensors: tuple[int, ...]

    @classmethod
    def of(cls, name: str, module: nn.Module) -> _Module:
        children = tuple(module._modules.values())
        return cls(name, module, type(module).forward, dict(module.__dict__), children, _addresses(module))

    def change(self) -> str | None:
        """Return what has changed since."""
        own = self.module.__dict__
        if type(self.module).forward is not self.forward:
            return "another forward"
        if len(own) != len(self.attributes) or not all(map(is_, own.values(), self.attributes.values())):
            for name in {**own, **self.attributes}:
                now, before = own.get(name), self.attributes.get(name)
                plain = isinstance(now, (int, float, str, tuple, Rule)) and type(now) is type(before)
                if now is not before and not (plain and now == before):
                    return f"another {name!r}"
        if tuple(self.module._modules.values()) != self.children:
            return "other modules"
        if _addresses(self.module) != self.tensors:
            return "weights in other memory (as by .to() or load_state_dict(assign=True))"
        return None


def _addresses(module: nn.Module) -> tuple[int, ...]:
    tensors = (*module._parameters.values(), *module._buffers.values())
    return tuple(0 if tensor is None else tensor.data_ptr() for tensor in tensors)


def _autocast(device: torch.device) -> tuple[bool, torch.dtype]:
    return checks.autocast_enabled(device.type), torch.get_autocast_dtype(device.type)


class CapturedForward:
    """What :func:`cuda_graph` returns; call it like the model.

    Args:
        vit: the model.
        images: [B, 3, height, width].

    Attributes:
        images: where the graph reads: a call copies its images here.
    """

    def __init__(self, vit: nn.Module, images: Tensor) -> None:
        self.images = images.detach().clone()
        self._stages = find_stages(vit)
        self._autocast = _autocast(images.device)
        self._lock = threading.Lock()
        enabled, dtype = self._autocast
        # Without autocast's cache, which frees its copies of the weights: the graph would go on reading them.
        with torch.autocast(images.device.type, dtype, enabled, cache_enabled=False), torch.no_grad():
            self._graph, result = capture(lambda: vit(self.images), images.device)
        self._results, self._tree = pytree.tree_flatten(result)
        for value in self._results:
            if not isinstance(value, (Tensor, int, float, str, type(None))):
                raise TypeError(
                    "the model must return tensors, alone or in tuples, lists, dicts or a ModelOutput, got "
                    f"a {type(value).__name__}"
                )
        self._rules = [stage.rule for stage in self._stages]
        self._modules = [_Module.of(*named) for named in vit.named_modules()]
        self._tensors = [*vit.parameters(), *vit.buffers()]
        self._hooks = [getattr(module, name) for module in vit.modules() for name in HOOKS]
        self._before = self._state()
        # The graph reads their memory, which must not be freed even if the model gets others.
        self._weights = [tensor.detach() for tensor in self._tensors]
        self._done = torch.cuda.Event()
        self._done.record(torch.cuda.current_stream(images.device))

    def __call__(self, images: Tensor) -> Any:
        """Return what the model returns for `images`, in tensors of its own.

        Args:
            images: of the shape, dtype and device that were captured. :attr:`images` itself is not copied.

        Raises:
            ValueError: they are of another shape or device, or require a gradient.
            TypeError: they are no tensor, or of another dtype.
            RuntimeError: the model has changed since it was captured; the message says what.
        """
        self._check_images(images)
        with self._lock, torch.cuda.device(self.images.device), torch.no_grad():
            stream = torch.cuda.current_stream()
            stream.wait_event(self._done)  # the last call may have been on another stream
            if images is not self.images:
                self.images.copy_(images)
            self._graph.replay()
            copies = [value.clone() if isinstance(value, Tensor) else value for value in self._results]
            self._done.record(stream)
        # Only now, while the GPU computes.
        self._check_model()
        return pytree.tree_unflatten(copies, self._tree)

    def _check_images(self, images: Tensor) -> None:
        expected = self.images
        if not isinstance(images, Tensor) or images.dtype != expected.dtype:
            given = images.dtype if isinstance(images, Tensor) else type(images).__name__
            raise TypeError(f"images must be {expected.dtype}, as they were captured, got {given}")
        if images.shape != expected.shape or images.device != expected.device:
            raise ValueError(
                f"images must have shape {tuple(expected.shape)} on {expected.device}, as captured, "
                f"got {tuple(images.shape)} on {images.device}: call evit_ext.cuda_graph for each batch size"
            )
        if torch.is_grad_enabled() and images.requires_grad:
            raise ValueError("images require a gradient, which the graph does not compute: call the model")

    def _check_model(self) -> None:
        """Raise RuntimeError if the model would now compute something else."""
        again = "after the capture: call evit_ext.cuda_graph again"
        if [stage.rule for stage in self._stages] != self._rules:
            raise RuntimeError(f"the keep rate, or the rule, of the model was changed {again}")
        _check_unobserved(self._stages)
        if _autocast(self.images.device) != self._autocast:
            raise RuntimeError(f"autocast was switched {again}")
        # At once for all modules: one after another, it would take longer than a small model.
        now = self._state()
        if len(now) == len(self._before) and all(map(is_, now, self._before)) and not self._moved_or_hooked():
            return
        for known in self._modules:
            if _has_hooks(known.module):
                raise RuntimeError(f"{_shown(known.name)} got a hook {again}, without the hook")
            if (change := known.change()) is not None:
                raise RuntimeError(f"{_shown(known.name)} got {change} {again}")

    def _state(self) -> list[Any]:
        """Return all that the modules hold, and their classes' forwards, to be compared by identity."""
        modules = [known.module for known in self._modules]
        kinds = dict.fromkeys(type(module) for module in modules)
        held = ((module.__dict__, module._parameters, module._buffers, module._modules) for module in modules)
        values = (values for dictionaries in held for values in map(dict.values, dictionaries))
        return [*map(type, modules), *(kind.forward for kind in kinds), *chain.from_iterable(values)]

    def _moved_or_hooked(self) -> bool:
        """Return whether weights are elsewhere in memory, or hooks may have come."""
        addresses = [tensor.data_ptr() for tensor in self._weights]
        moved = [tensor.data_ptr() for tensor in self._tensors] != addresses
        return moved or any(self._hooks) or is_watched(self._modules[0].module)


def _shown(name: str) -> str:
    return f"the model's {name}" if name else "the model"


def _has_hooks(module: nn.Module) -> bool:
    """Return whether hooks would run if `module` were called, other than those of evit_ext."""
    if not is_watched(module):
        return False
    hooks = [hook for name in HOOKS for hook in getattr(module, name).values()]
    return not hooks or any(not str(hook.__module__).startswith("evit_ext.") for hook in hooks)


def _check_unobserved(stages: list[Stage]) -> None:
    """Raise RuntimeError if records or oracles wait for what stages report."""
    if any(stage.recorders or stage.guidance is not None for stage in stages):
        raise RuntimeError(
            "a record or an oracle sees nothing of a CUDA graph: call the model itself inside "
            "evit_ext.record_tokens and Oracle.guide"
        )


def cuda_graph(vit: nn.Module, images: Tensor) -> CapturedForward:
    """Capture the forward of a model in a CUDA graph, for inference with one batch size.

    A GPU replays the graph as a whole, so small batches do not wait for Python to start each kernel. How many
    tokens leave a stage follows from sizes alone; which ones is computed anew in each replay. Not run on a
    GPU yet.

    Weights are read anew too: what an optimizer step, ``load_state_dict`` or other changes in place make of
    them counts from the next call on. Rules that draw random numbers draw new ones. Other changes of the
    model are refused when it is called, instead of being ignored: another keep rate, another mode, weights
    elsewhere in memory, modules, forwards or hooks. What torch is told later has no effect (TensorFloat-32,
    ``sdpa_kernel``, :func:`evit_ext.ops.use_reference`). Calls from several threads and streams take turns.

    In training, and where sizes vary, use ``torch.compile(vit, mode="reduce-overhead")``: it captures a graph
    for each size and keep rate.

    Args:
        vit: a model in eval mode on a GPU, changed by :func:`evit_ext.apply` or not.
        images: a batch [B, 3, height, width] on the same GPU, of the shape and dtype of those to come. Its
            values do not matter.

    Returns:
        What takes the place of the model: ``captured(images)``. It keeps the memory of a forward, and as much
        as its images and weights take.

    Raises:
        TypeError: `vit` is no module, `images` no tensor, or the model returns something else than tensors.
        ValueError: the images, or something of the model, are not on one GPU; or the model is compiled.
        RuntimeError: it is in training mode, has hooks, is being recorded or guided, or does what cannot be
            captured.

    Example:
        >>> captured = evit_ext.cuda_graph(vit.eval(), images)
        >>> logits = captured(images)
    """
    if not isinstance(vit, nn.Module):
        raise TypeError(f"vit must be a model, a torch module, got {type(vit).__name__}")
    if not isinstance(images, Tensor):
        raise TypeError(f"images must be a tensor [B, 3, height, width], got {type(images).__name__}")
    if images.device.type not in _DEVICES:
        raise ValueError(
            f"CUDA graphs are for an NVIDIA GPU: move model and images there, got {images.device}"
        )
    if hasattr(vit, "_orig_mod"):
        raise ValueError(
            'the model is compiled: compile it with mode="reduce-overhead", which makes CUDA graphs, or pass '
            "the one inside (._orig_mod)"
        )
    for name, tensor in (*vit.named_parameters(), *vit.named_buffers()):
        if tensor.device != images.device:
            raise ValueError(
                f"model and images must be on one GPU, got {name} on {tensor.device}, images on "
                f"{images.device}"
            )
    for name, module in vit.named_modules():
        if module.training:
            raise RuntimeError(
                f"{_shown(name)} is in training mode: call vit.eval() first; for training, use "
                'torch.compile(vit, mode="reduce-overhead")'
            )
        if _has_hooks(module):
            raise RuntimeError(
                f"{_shown(name)} has hooks, which a CUDA graph does not run: remove them, or call the model"
            )
    _check_unobserved(find_stages(vit))
    with torch.inference_mode(False):  # or its images could not be overwritten outside of inference mode
        return CapturedForward(vit, images)
