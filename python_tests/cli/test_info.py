"""evit info: what models cost, side by side and layer by layer, and what fits a budget."""

from __future__ import annotations

import json

import pytest

import evit_ext
from evit_ext import _C
from evit_ext.cli import main


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(arguments) == 0
    return capsys.readouterr().out


def test_both_methods_side_by_side(capsys: pytest.CaptureFixture[str]) -> None:
    out = run(capsys, "info")
    lines = [line.split() for line in out.splitlines()]
    assert ["model", "parameters", "1", "0.9", "0.8", "0.7", "0.6", "0.5"] in lines
    assert ["deit_small", "22.05", "M", "4.60", "4.02", "3.48", "3.03", "2.64", "2.31"] in lines
    assert ["dynamicvit_small", "22.77", "M", "4.74", "4.04", "3.46", "2.98", "2.56", "2.23"] in lines
    assert f"evit_ext: {evit_ext.__version__}" in out
    assert f"cpu_capability: {_C.build_info()['cpu_capability']}" in out


def test_other_models_and_sizes_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    names = ("lvvit_small", "vit_small_patch16_224", "evit_deit_tiny_patch16_224")
    out = json.loads(run(capsys, "info", *names, "--keep-rate", "0.7", "--json"))
    assert [cost["model"] for cost in out["models"]] == list(names)
    gmacs = {cost["model"]: f"{cost['gmacs']['0.7']:.2f}" for cost in out["models"]}
    assert gmacs == {
        "lvvit_small": "4.71",
        "vit_small_patch16_224": "3.03",
        "evit_deit_tiny_patch16_224": "0.82",
    }
    assert out["build"]["cuda_operators"] is _C.build_info()["cuda_operators"]
    larger = json.loads(
        run(capsys, "info", "deit_small", "--keep-rate", "0.5", "--img-size", "304", "--json")
    )
    assert f"{larger['models'][0]['gmacs']['0.5']:.2f}" == "4.44"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nothing"], "there is no model 'nothing': expected one of deit_base,"),
        (["resnet18"], "ResNet is not supported"),
        (["beit_base_patch16_224", "--img-size", "8"], "Calculated padded input size"),
        (["deit_tiny", "--keep-rate", "1.5"], r"keep_rate must be in (0, 1], got 1.5"),
    ],
)
def test_bad_input(capsys: pytest.CaptureFixture[str], arguments: list[str], message: str) -> None:
    assert main(["info", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("evit: error: ") and message in captured.err
    assert captured.err.count("\n") == 1 and not captured.out


def cells(out: str) -> list[list[str]]:
    """The cells of the tables, without the commands that come next."""
    return [line.split() for line in out.partition("next:\n")[0].splitlines()]


def test_one_model_layer_by_layer(capsys: pytest.CaptureFixture[str]) -> None:
    """Tokens and GMACs of DeiT-S as the paper's: blocks 3, 6 and 9 reorganise."""
    out = run(capsys, "info", "deit_small")
    assert "deit_small: DeiT, 12 blocks, 384 channels, 6 heads\n" in out
    assert "images: 224 x 224, 196 patches of 16 x 16, and 1 prefix token\n" in out
    assert "keep rate: 0.7, what is not kept is fused into one token\n" in out
    lines = cells(out)
    assert ["blocks.0", "-", "2", "197", "197", "-", "-", "5,323,392", "1.135", "37.5%"] in lines
    assert ["blocks.3", "197", "140", "138", "of", "196", "58", "1,774,464", "0.311", "10.3%"] in lines
    assert ["blocks.6", "140", "100", "98", "of", "139", "41", "1,774,464", "0.216", "7.1%"] in lines
    assert ["all", "22,050,664", "3.029", "100.0%"] in lines
    assert ["1", "4.60", "100%", "1.00", "197"] in lines
    assert ["0.7", "3.03", "66%", "1.52", "72"] in lines
    assert "cpu_capability" not in out


def test_layers_are_those_of_the_first_keep_rate(capsys: pytest.CaptureFixture[str]) -> None:
    out = run(capsys, "info", "dynamicvit_tiny", "--keep-rate", "0.5", "1")
    lines = cells(out)
    assert "keep rate: 0.5, what is not kept is dropped\n" in out
    assert any(line[:6] == ["score_predictor.0", "-", "-", "98", "of", "196"] for line in lines)
    assert [line[0] for line in lines[-2:]] == ["0.5", "1"]


def test_one_model_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    out = json.loads(run(capsys, "info", "vit_tiny_patch16_224", "--img-size", "64", "--json"))
    (facts,) = out["models"]
    assert facts["input_size"] == [64, 64] and facts["patches"] == 16 and facts["keep_rate"] == [0.7]
    blocks = [layer for layer in facts["layers"] if layer["name"].startswith("blocks.")]
    assert len(blocks) == 12 and blocks[3]["kept"] == 12 and blocks[3]["fused"] == 4
    at_own = next(row for row in facts["keep_rates"] if row["keep_rate"] == 0.7)
    assert at_own["gmacs"] == facts["gmacs"]["0.7"] == sum(layer["macs"] for layer in facts["layers"]) / 1e9
    assert at_own["tokens"] == blocks[-1]["tokens_out"]


def test_budget(capsys: pytest.CaptureFixture[str]) -> None:
    """The paper's four sizes for the price of DeiT-S, and DeiT-S itself."""
    out = run(capsys, "info", "deit_small", "--budget", "4.6")
    rows = [line[:3] for line in cells(out) if line and line[0].isdigit()]
    paper = [["256", "0.8", "4.61"], ["272", "0.7", "4.56"], ["288", "0.6", "4.50"], ["304", "0.5", "4.44"]]
    assert [row for row in rows if row in paper] == paper
    assert rows[1] == ["224", "1", "4.60"]


def test_budget_of_another_model_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("info", "deit_tiny", "--budget", "deit_tiny", "--tolerance", "0", "--keep-rate", "0.5", "1")
    (found,) = json.loads(run(capsys, *arguments, "--json"))["budget"]
    assert f"{found['gmacs']:.2f}" == "1.25" and found["tolerance"] == 0
    assert found["fits"][0] == {"img_size": 224, "keep_rate": 1.0, "gmacs": found["gmacs"]}
    assert all(fit["gmacs"] <= found["gmacs"] for fit in found["fits"])


def test_schedule(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("info", "deit_small", "--budget", "3", "--schedule", "rising", "--drop-loc", "3", "6", "9")
    fit = evit_ext.fit_keep_rates("deit_small", 3e9, shape="rising")
    rates = list(fit.keep_rates)
    out = run(capsys, *arguments)
    assert [line for line in cells(out) if line and line[0].isdigit()] == [
        [str(block), f"{rate:g}"] for block, rate in zip((3, 6, 9), rates, strict=True)
    ]
    assert f"evit_ext.apply(vit, {rates}, drop_loc=[3, 6, 9])" in out
    (found,) = json.loads(run(capsys, *arguments, "--json"))["budget"]
    assert (found["keep_rate"], found["drop_loc"], found["gmacs"]) == (rates, [3, 6, 9], fit.macs / 1e9)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--schedule", "rising"], "--schedule needs a --budget"),
        (["--budget", "1", "--drop-loc", "3"], "--drop-loc is for a --schedule"),
        (["--budget", "1", "--schedule", "rising", "--keep-rate", "0.5"], "leave out --tolerance and"),
        (["--budget", "0.2", "--schedule", "rising"], "the budget is too small for deit_tiny"),
        (["--budget", "nothing"], "there is no model 'nothing'"),
        (["--budget", "-1"], "--budget must be GMACs, 10^9 multiply-accumulates, above 0"),
        (["--budget", "nan"], "--budget must be GMACs, 10^9 multiply-accumulates, above 0"),
        (["--budget", "1e-6"], "for an image of one patch, 16 pixels, more than the budget"),
        (["--budget", "4.6", "--keep-rate", "0"], "keep_rate must be in (0, 1], got 0"),
        (["--budget", "4.6", "--tolerance", "-1"], "--tolerance must be from 0 to 100 percent, got -1"),
        (["--budget", "4.6", "--img-size", "224"], "leave out --img-size"),
        (["--tolerance", "1"], "--tolerance is for a --budget"),
    ],
)
def test_bad_budget(capsys: pytest.CaptureFixture[str], arguments: list[str], message: str) -> None:
    assert main(["info", "deit_tiny", *arguments]) == 2
    captured = capsys.readouterr()
    assert message in captured.err and captured.err.count("\n") == 1 and not captured.out
