"""What part of a call the reduction of tokens is, by the profiles of ONNX Runtime and OpenVINO.

The operators of the reduction are found in the graph that an engine runs, after its own optimisations: those
that only the choice of tokens (TopK) needs, and what follows from TopK up to the concatenation of the kept
tokens and the fused one.
"""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import onnx
from torch import Tensor

from evit_ext.export.openvino_file import core

CALLS = 20

#: What only moves rows or gives them another shape, by both engines' names.
_MOVES = {
    "Slice", "StridedSlice", "Split", "VariadicSplit", "Reshape", "Flatten", "Squeeze", "Unsqueeze",
    "Transpose", "Gather", "Cast", "Convert", "Reorder", "Shape", "ShapeOf", "Expand", "Broadcast", "Const",
}  # fmt: skip
_CONCATENATIONS = ("Concat", "Concatenation")


class Node(NamedTuple):
    """An operator: its kind, and the names of the operators that its inputs come from."""

    kind: str
    inputs: tuple[str, ...]


@dataclass(frozen=True)
class Profile:
    """A model in an engine: milliseconds of a call's operators, and of those of the reduction among them."""

    model: str
    engine: str
    batch: int
    milliseconds: float
    reduction: float
    operators: dict[str, int]
    attention: str

    def cells(self) -> list[str]:
        """Return a line of a table."""
        share = 100 * self.reduction / self.milliseconds
        numbers = [f"{self.milliseconds:.2f}", f"{self.reduction:.2f}", f"{share:.1f}"]
        return [self.model, self.engine, str(self.batch), *numbers, self.attention]


def reduction_nodes(graph: Mapping[str, Node]) -> set[str]:
    """Return the names of the operators that reduce tokens."""
    consumers: dict[str, set[str]] = {name: set() for name in graph}
    for name, node in graph.items():
        for source in node.inputs:
            consumers[source].add(name)
    found = {name for name, node in graph.items() if node.kind == "TopK"}
    _add_what_only_they_need(found, graph, consumers, any_kind=True)
    ahead = [name for name in found if graph[name].kind == "TopK"]
    while ahead:
        name = ahead.pop()
        for consumer in consumers[name] - found:
            found.add(consumer)
            # Beyond the concatenation that makes the new tokens, all that follows is the model's.
            if graph[consumer].kind not in _CONCATENATIONS:
                ahead.append(consumer)
    _add_what_only_they_need(found, graph, consumers, any_kind=False)
    return found


def _add_what_only_they_need(
    found: set[str], graph: Mapping[str, Node], consumers: Mapping[str, set[str]], any_kind: bool
) -> None:
    ahead = list(found)
    while ahead:
        for source in graph[ahead.pop()].inputs:
            fits = any_kind or graph[source].kind in _MOVES
            if source not in found and fits and consumers[source] <= found:
                found.add(source)
                ahead.append(source)


def profile_onnxruntime(name: str, file: Path, images: Tensor, threads: int) -> Profile:
    """Return the profile of a file in ONNX Runtime."""
    import onnxruntime

    with tempfile.TemporaryDirectory() as folder:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3
        options.enable_profiling = True
        options.profile_file_prefix = str(Path(folder) / "profile")
        options.optimized_model_filepath = str(Path(folder) / "optimized.onnx")
        session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
        given = {session.get_inputs()[0].name: images.numpy()}
        for _ in range(CALLS):
            session.run(None, given)
        events = json.loads(Path(session.end_profiling()).read_text())
        graph = onnx_graph(onnx.load(options.optimized_model_filepath))
    times: Counter[str] = Counter()
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            times[event["name"].removesuffix("_kernel_time")] += event["dur"]
    return _profile(name, "onnxruntime", len(images), graph, times)


def onnx_graph(model: Any) -> dict[str, Node]:
    """Return the operators of an ONNX model by name."""
    makers = {output: node.name for node in model.graph.node for output in node.output}
    return {
        node.name: Node(node.op_type, tuple(makers[value] for value in node.input if value in makers))
        for node in model.graph.node
    }


def profile_openvino(name: str, file: Path, images: Tensor, threads: int) -> Profile:
    """Return the profile of a file in OpenVINO, in float32."""
    model = core().read_model(str(file))
    model.reshape(list(images.shape))
    settings = {"PERF_COUNT": True, "INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": threads}
    compiled = core().compile_model(model, "CPU", settings)
    request = compiled.create_infer_request()
    times: Counter[str] = Counter()
    for _ in range(CALLS):
        request.infer([images.numpy()])
        for part in request.profiling_info:
            times[part.node_name] += part.real_time.total_seconds() * 1e6
    return _profile(name, "openvino", len(images), openvino_graph(compiled.get_runtime_model()), times)


def openvino_graph(model: Any) -> dict[str, Node]:
    """Return the operators of a compiled model by name."""
    return {
        op.get_friendly_name(): Node(
            str(op.get_rt_info()["layerType"].astype(str)),
            tuple(value.get_source_output().get_node().get_friendly_name() for value in op.inputs()),
        )
        for op in model.get_ops()
    }


def _profile(
    name: str, engine: str, batch: int, graph: dict[str, Node], times: Mapping[str, float]
) -> Profile:
    reduction = reduction_nodes(graph)
    kinds = Counter(node.kind for node in graph.values())
    # A softmax that is an operator of its own has its products before and behind it.
    apart = sum(node.kind == "Softmax" and each not in reduction for each, node in graph.items())
    return Profile(
        model=name,
        engine=engine,
        batch=batch,
        milliseconds=sum(times.values()) / CALLS / 1e3,
        reduction=sum(time for each, time in times.items() if each in reduction) / CALLS / 1e3,
        operators=dict(kinds),
        attention="three operators" if apart else "one operator",
    )
