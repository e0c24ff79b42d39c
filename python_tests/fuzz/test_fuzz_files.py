"""Files that a stranger has written: each is read, or refused with one error of the documented type."""

from __future__ import annotations

import io
import json
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from fuzzed import fuzzed
from hypothesis import example, given
from hypothesis import strategies as st
from safetensors.torch import save

from evit_ext import models
from evit_ext.export import Metadata, read_metadata
from evit_ext.training import load_config
from evit_ext.training.config import TrainConfig
from evit_ext.weights import from_pretrained, load_checkpoint, save_pretrained

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore")]

#: What messages may take: a line or two of each of a few values.
LONGEST = 2000

json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.integers(-2, 300)
    | st.floats()
    | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)


@st.composite
def damages(draw: Any) -> list[tuple[float, int]]:
    """Bytes of a file that become others: where, as a share of its length, and by what; -1 cuts it there."""
    return draw(st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(-1, 255)), max_size=4))


def damaged(data: bytes, places: list[tuple[float, int]]) -> bytes:
    changed = bytearray(data)
    for share, by in places:
        place = int(share * len(changed))
        if by < 0:
            del changed[place:]
        elif changed:
            changed[place] ^= by
    return bytes(changed)


# --- checkpoints


def small() -> Any:
    sizes: dict[str, Any] = {"img_size": 32, "patch_size": 8, "embed_dim": 12, "depth": 2, "num_heads": 2}
    torch.manual_seed(0)
    return models.deit_tiny(**sizes, drop_loc=(1,), num_classes=3).eval()


DTYPES = [
    torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e8m0fnu,
    torch.float4_e2m1fn_x2, torch.int64, torch.int8, torch.uint16, torch.bool, torch.complex64,
]  # fmt: skip


@st.composite
def tensors(draw: Any) -> Any:
    """A tensor of any dtype, shape and layout; few bytes of memory."""
    shape = draw(st.lists(st.integers(0, 20), max_size=4))
    dtype = draw(st.sampled_from(DTYPES))
    kind = draw(st.sampled_from(["dense", "expanded", "meta", "sparse", "transposed"]))
    if kind == "expanded":
        shape = draw(st.lists(st.sampled_from([0, 1, 12, 17, 10**6]), max_size=4))
        return torch.zeros((), dtype=torch.float32).expand(shape)
    value = torch.empty(shape, dtype=dtype, device="meta" if kind == "meta" else "cpu")
    if kind == "sparse" and dtype in (torch.float32, torch.int64) and shape:
        return value.to_sparse()
    return value.transpose(0, -1) if kind == "transposed" and shape else value


STATE = small().state_dict()
KEYS = st.sampled_from([*STATE, "extra", "module.norm.weight", "score_predictor.0.in_conv.0.weight", ""])
entries = st.sampled_from(["", "model", "state_dict", "model_ema", "state_dict_ema"])


@fuzzed
@given(
    st.dictionaries(KEYS, tensors() | st.none() | json_values, max_size=3),
    entries,
    entries,
    st.booleans(),
    st.booleans(),
    st.booleans(),
    damages(),
)
# Found by it: a norm without a dimension, of which the length was asked.
@example({"blocks.0.norm1.weight": torch.zeros(())}, "", "", True, True, False, [])
def test_checkpoints(
    tmp_path: Path,
    changes: dict[str, Any],
    entry: str,
    outer: str,
    strict: bool,
    resize: bool,
    legacy: bool,
    places: list[tuple[float, int]],
) -> None:
    state: Any = {key: value for key, value in {**STATE, **changes}.items() if value is not None}
    for name in (entry, outer):
        state = {name: state, "epoch": 3} if name else state
    buffer = io.BytesIO()
    try:
        torch.save(state, buffer, _use_new_zipfile_serialization=not legacy)
    except Exception:  # of tensors that cannot be saved
        return
    load_or_refuse(tmp_path, damaged(buffer.getvalue(), places), strict, resize)


@fuzzed
@given(st.dictionaries(KEYS, tensors() | st.none(), max_size=3), st.booleans(), damages())
def test_safetensors(
    tmp_path: Path, changes: dict[str, Any], strict: bool, places: list[tuple[float, int]]
) -> None:
    state = {key: value for key, value in {**STATE, **changes}.items() if value is not None}
    if any(value.numel() > 10**5 for value in state.values()):
        return  # expanded, which safetensors cannot be
    try:
        data = save({key: value.contiguous() for key, value in state.items()})
    except Exception:
        return
    load_or_refuse(tmp_path, damaged(data, places), strict, False)


def load_or_refuse(folder: Path, data: bytes, strict: bool, resize: bool) -> None:
    file = folder / "checkpoint"
    file.write_bytes(data)
    model = small()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    try:
        load_checkpoint(model, file, strict=strict, resize_pos_embed=resize)
    except ValueError as error:
        assert len(str(error)) < LONGEST and str(file) in str(error)
        assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


# --- recipes

FIELDS = st.sampled_from([*TrainConfig.__dataclass_fields__, "no_such_field"])
SYNTAX = st.lists(st.sampled_from(["lr", *":[]{}&*ab-!|>?#'\"1 \n"]), max_size=30).map("".join)


@fuzzed
@given(
    st.dictionaries(FIELDS, json_values, max_size=4).map(yaml.safe_dump) | st.text(max_size=60) | SYNTAX,
    damages(),
)
@example("lr: !!int ''", [])
@example("lr: 1" + "0" * 400, [])
@example("model_args: &a {b: *a}", [])
def test_recipes(tmp_path: Path, text: str, places: list[tuple[float, int]]) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_bytes(damaged(text.encode("utf-8", "surrogatepass"), places))
    try:
        config = load_config(file)
    except (ValueError, TypeError) as error:
        assert len(str(error)) < LONGEST and str(file) in str(error)
        return
    config.save(file)
    assert load_config(file) == config


# --- config.json


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_pretrained(small(), tmp_path_factory.mktemp("saved"))


ARGUMENTS = st.sampled_from(
    [
        "img_size", "patch_size", "in_chans", "num_classes", "global_pool", "embed_dim", "depth", "num_heads",
        "mlp_ratio", "qkv_bias", "init_values", "class_token", "reg_tokens", "no_embed_class", "pre_norm",
        "drop_rate", "drop_path_rate", "weight_init", "act_layer", "norm_layer", "block_fn", "pretrained_cfg",
        "checkpoint_path", "features_only", "keep_rate", "drop_loc",
    ]
)  # fmt: skip
EVIT = st.sampled_from(["keep_rate", "drop_loc", "fuse_token", "dtype"])
ENTRIES = st.sampled_from(
    ["architecture", "model_args", "pretrained_cfg", "evit", "num_classes", "label_names"]
)


@fuzzed
@given(
    st.dictionaries(ARGUMENTS, json_values, max_size=2),
    st.dictionaries(EVIT, json_values, max_size=1),
    st.dictionaries(ENTRIES, json_values, max_size=1),
    damages(),
)
@example({"depth": 10**6}, {}, {}, [])
@example({"act_layer": "wavy"}, {}, {}, [])
def test_configurations(
    folder: Path,
    arguments: dict[str, Any],
    evit: dict[str, Any],
    entries: dict[str, Any],
    places: list[tuple[float, int]],
) -> None:
    file = folder / "config.json"
    original = file.read_bytes()
    config = json.loads(original)
    config["model_args"].update(arguments)
    config["evit"].update(evit)
    file.write_bytes(damaged(json.dumps({**config, **entries}).encode(), places))
    try:
        from_pretrained(folder)
    except ValueError as error:
        assert len(str(error)) < LONGEST
        assert str(file) in str(error) or "model.safetensors" in str(error)
    finally:
        file.write_bytes(original)


# --- metadata

GOOD = Metadata("m", (0.5,), (3, 8, 8), (0.5,) * 3, (1.0,) * 3, "bilinear", 0.9).to_json()


@fuzzed
@given(
    st.dictionaries(st.sampled_from([*Metadata.__dataclass_fields__]), json_values, max_size=2),
    st.sampled_from(["a/extra/evit.json", "a/data/aotinductor/model/b_metadata.json", "other"]),
    damages(),
    damages(),
)
@example({}, "a/extra/evit.json", [], [(0.984375, 1)])  # found by it: a place before the file's beginning
def test_metadata(
    tmp_path: Path,
    changes: dict[str, Any],
    name: str,
    inside: list[tuple[float, int]],
    outside: list[tuple[float, int]],
) -> None:
    text = json.dumps({**json.loads(GOOD), **changes})
    text = json.dumps({"evit": text}) if "aotinductor" in name else text
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(name, damaged(text.encode(), inside))
    file = tmp_path / "a.pt2"
    file.write_bytes(damaged(buffer.getvalue(), outside))
    try:
        read_metadata(file)
    except ValueError as error:
        assert len(str(error)) < LONGEST and str(file) in str(error)
    except RuntimeError as error:
        assert "ONNX needs the package" in str(error)
