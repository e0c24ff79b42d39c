"""What is wrong in a command line and its data is told at once: torch and timm are not imported before."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import timm
from image_data import write_folder

from evit_ext import models
from evit_ext.cli import main, parser
from evit_ext.cli.model_names import problem_with_model

PROGRAM = """
import json, sys, time
sys.argv = ["evit"]
from evit_ext.cli import main
try:
    status = main(json.loads(sys.stdin.read()))
except SystemExit as end:
    status = end.code
print(json.dumps([status, sorted({"torch", "timm", "numpy"} & set(sys.modules)), time.process_time()]))
"""


def run(command: str, folder: Path) -> tuple[int, list[str], float, str]:
    """The exit status, slow packages that were imported, seconds of the processor, and what was said."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        input=json.dumps(command.split()),
        cwd=folder,
        capture_output=True,
        text=True,
    )
    status, slow, seconds = json.loads(done.stdout.splitlines()[-1])
    return status, slow, seconds, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("command", "parts"),
    [
        ("train --data nowhere --lr x", ["2 things are wrong", "lr must be a number", "there is no nowhere"]),
        (
            "train --data nowhere --learning-rate 3 --epoch 4 --modl a --model-args b",
            ["4 things are wrong", "--learning-rate 3 (the nearest is --lr)",
             "--modl a (the nearest is --model)", "takes name=value, got 'b'"],
        ),
        ("train --data photos --batch-size 99", ["the training data has 24 images, fewer than the 99"]),
        (
            "train --data photos --model deit_smal -o photos/train/x.txt/run",
            ["2 things are wrong", "the nearest names are deit_small", "x.txt: is a file"],
        ),
        ("train --data nowhere --model vit_tiny_patch16_224.augreg_in21k", ["error: data must be a folder"]),
        ("export --chekpoint a", ["the nearest is --checkpoint"]),
        ("visualize --help", ["--html FILE"]),
    ],
)  # fmt: skip
def test_at_once(command: str, parts: list[str], tmp_path: Path) -> None:
    write_folder(tmp_path / "photos", train=12, val=2)
    (tmp_path / "photos" / "train" / "x.txt").touch()
    status, slow, seconds, said = run(command, tmp_path)
    assert status == (0 if "--help" in command else 2), said
    assert slow == []
    assert seconds < 1  # 0.2 to 0.3 s
    for part in parts:
        assert part in said


def test_models_by_their_sources() -> None:
    """Names that are registered are found, and what is not is refused with the nearest."""
    for name in (*models.__all__, *timm.list_models()[::30], "vit_base_patch16_224.mae"):
        assert problem_with_model(name) == ""
    assert "vit_tiny_patch16_224" in problem_with_model("vit_tiny_patch16_2244")
    assert "there is no model 'a(b': expected one of deit_base" in problem_with_model("a(b")


def test_every_command_takes_output() -> None:
    commands = next(action.choices for action in parser()._actions if isinstance(action.choices, dict))
    for name, command in commands.items():
        output = [a for a in command._actions if a.dest == "output"]
        assert output and output[0].option_strings == ["-o", "--output"], name


def test_the_commands_that_come_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each is taken by the real parser."""
    monkeypatch.chdir(tmp_path)
    small = "--model-args depth=1 embed_dim=24 num_heads=1 --img-size 32 --drop-loc 0"
    photos = write_folder(tmp_path / "photos", train=2, val=2)
    photo = next((photos / "val").rglob("*.jpg"))
    for command in (
        "info deit_tiny -o info.json",
        f"visualize {photo} --model deit_tiny --random-weights -o seen.png {small}",
        f"export deit_tiny --random-weights {small}",
        f"export deit_tiny --random-weights --format hf {small}",
        "benchmark deit_tiny --batch-size 1 --seconds 0.1 --latency-calls 1 --precision float32",
    ):
        assert main(command.split()) == 0
        lines = capsys.readouterr().out.splitlines()
        after = lines[lines.index("next:") + 1 :]
        assert after
        for line in after:
            assert line.startswith("  ")
            program, *words = line.split()
            if program == "evit":
                parser().parse_args(words)
    assert json.loads(Path("info.json").read_text())["models"][0]["model"] == "deit_tiny"
