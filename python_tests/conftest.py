"""Fixtures shared by the tests: devices, small models and the golden files of the published code."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from inspect import signature
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from cpu_calls import Calls
from telling_weights import draw_telling_weights
from thorough import is_thorough
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer

import evit_ext
from evit_ext import _C

GOLDEN = Path(__file__).parent / "golden"

# TensorFloat-32 rounds factors to 10 bits: with it, no comparison with float32 arithmetic means anything.
torch.backends.cuda.matmul.allow_tf32 = False
torch.backends.cudnn.allow_tf32 = False


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--devices",
        choices=["all", "cpu", "cuda"],
        default="all",
        help="what `device` goes through",
    )
    parser.addoption(
        "--cuda-on-host",
        metavar="LIBRARY",
        help="run the CUDA kernels on CPU tensors: the CMake build's libevit_cuda_on_host",
    )


def pytest_configure(config: pytest.Config) -> None:
    library = config.getoption("--cuda-on-host")
    if library:
        # Its operators take the place of those that evit_ext has registered for the CPU.
        torch.ops.load_library(library)


def tested_devices(config: pytest.Config) -> list[str]:
    """The device types that `device` goes through; an error where one was asked for that is not there."""
    wanted = config.getoption("--devices")
    if wanted == "cuda" and not torch.cuda.is_available():
        raise pytest.UsageError("--devices cuda: torch.cuda.is_available() is False")
    available = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    return available if wanted == "all" else [wanted]


def pytest_report_header(config: pytest.Config) -> str:
    devices = tested_devices(config)
    header = f"evit_ext: {Path(evit_ext.__file__).parent}; devices tested: {', '.join(devices)}"
    if config.getoption("--cuda-on-host"):
        return f"{header} (with the CUDA kernels, on the host)"
    if "cuda" in devices:
        kernels = "kernels" if _C.build_info()["cuda_operators"] else "reference, the build has no kernels"
        return f"{header} ({torch.cuda.get_device_name()}; {kernels})"
    reason = "--devices cpu" if torch.cuda.is_available() else "torch.cuda.is_available() is False"
    return f"{header}; CUDA: not tested, {reason}"


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "device" in metafunc.fixturenames:
        metafunc.parametrize("device", tested_devices(metafunc.config), indirect=True)


@pytest.hookimpl(tryfirst=True)  # before -m chooses
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if is_thorough(str(Path(item.path).as_posix()) + "::" + item.name):
            item.add_marker("thorough")


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.name.startswith("test_opcheck") and importlib.util.find_spec("expecttest") is None:
        pytest.skip("torch.library.opcheck needs expecttest, which is not installed")


def pytest_exception_interact(node: pytest.Item | pytest.Collector) -> None:
    """Stop where a failed test has lost the CUDA context, so that the log names the one that did it."""
    if not torch.cuda.is_initialized():
        return
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        node.session.shouldstop = f"{node.nodeid} lost the CUDA context: {str(error).splitlines()[0]}"


@pytest.fixture
def device(request: pytest.FixtureRequest) -> torch.device:
    """Each device of this machine in turn, or those that --devices names."""
    return torch.device(request.param)


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Start every test with the same random numbers, whatever ran before it."""
    torch.manual_seed(0)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Compute with one thread: models this small lose far more to waiting threads than they gain."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    """Counts the calls of the CPU's faster forwards."""
    return Calls(monkeypatch)


@pytest.fixture(scope="session")
def weights() -> ModuleType:
    """The module that draws the weights, images and projections the golden files were made with."""
    spec = importlib.util.spec_from_file_location("golden_weights", GOLDEN / "weights.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def golden() -> Any:
    """A function from a golden file's name to its arrays as tensors."""

    def load(name: str) -> dict[str, torch.Tensor]:
        with np.load(GOLDEN / f"{name}.npz", allow_pickle=False) as arrays:
            return {key: torch.from_numpy(arrays[key]) for key in arrays.files}

    return load


@pytest.fixture(scope="session")
def small_vit() -> Any:
    """A function that builds a timm VisionTransformer with 4 blocks and 16 patches; arguments override.

    Its weights are large enough that every token tells on the logits, which timm's initial ones are not.
    """

    def build(cls: type = VisionTransformer, dtype: torch.dtype = torch.float32, **arguments: Any) -> Any:
        defaults = {
            "img_size": 32,
            "patch_size": 8,
            "embed_dim": 24,
            "depth": 4,
            "num_heads": 2,
            "num_classes": 5,
        }
        model = cls(**{**defaults, **arguments})
        draw_telling_weights(model)
        return model.to(dtype).eval()

    return build


#: Kinds of vision transformers that are supported, by what they add to the plain one.
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
