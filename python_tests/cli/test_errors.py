"""Errors of the command line, of every command: one line that says what was expected, and exit code 2."""

from __future__ import annotations

from pathlib import Path

import pytest

from evit_ext.cli import main, parser

UNKNOWN = "there is no model 'deit_smal': the nearest names are deit_small"
RATE = "keep_rate must be in (0, 1], got"

CASES: dict[str, str] = {
    "train --recipe binary": "binary is not YAML",
    "train --data notes.jpg": "data must be a folder with the data set's splits; notes.jpg is a file",
    "train --dataset digits --data empty": "'digits' needs no files: data must be none, or dataset, got",
    "train --dataset digits --drop-loc 3,6,9": "drop_loc must be whole numbers or none, got ['3,6,9']",
    "train --dataset digits --scale 1": "scale must be 2 numbers, got [1]",
    "train --recipe nothing": "there is no recipe 'nothing': expected one of cluttered-digits",
    "train --data nowhere": "data must be a folder with the data set's splits; there is no nowhere",
    "train --dataset digits --model deit_smal": UNKNOWN,
    "train --dataset digits --keep-rate 1.5": RATE,
    "train --dataset digits --model-args colour=red --output new/run": "cannot be built with",
    "train --dataset digits --keep-rate 1.5 --output empty": RATE,
    "train --dataset digits --output notes.jpg": "notes.jpg: is a file, expected a run's folder",
    "train --dataset digits --keep-rate many": "keep_rate must be a number or none, got 'many'",
    "eval": "a run's folder, or a model with one of --checkpoint FILE, --pretrained; got none",
    "eval nowhere": "and there is no folder nowhere",
    "eval runs/nowhere": "there is no folder runs/nowhere, nor a model of that name",
    "eval --model deit_tiny --checkpoint weights.pth --data nowhere": "there is no nowhere",
    "eval --model deit_smal --checkpoint weights.pth --dataset digits": UNKNOWN,
    "eval --model deit_tiny --checkpoint nowhere.pth --dataset digits": "there is no file nowhere.pth",
    "eval --model deit_tiny --checkpoint notes.jpg --dataset digits": "notes.jpg is no checkpoint, it begins",
    "eval --keep-rate many": "such as 0.7, with spaces between them, got 'many'; see evit eval --help",
    "eval --device tpu": "argument --device: invalid choice: 'tpu'",
    "eval notes.jpg": "notes.jpg is a file, expected the folder of a run or a model's name; a file",
    "visualize nowhere.jpg --model deit_tiny": "there is no file or folder nowhere.jpg",
    "visualize notes.jpg --model deit_tiny --random-weights": "notes.jpg cannot be read: not an image",
    "visualize notes.jpg --model deit_tiny": "--pretrained, --random-weights; got none of these",
    "visualize empty --model deit_tiny": "the folder empty has no image files, such as .jpg",
    "visualize notes.jpg --model deit_smal --random-weights": UNKNOWN,
    "visualize notes.jpg --model deit_tiny --random-weights --keep-rate 0": RATE,
    "visualize notes.jpg --model deit_tiny -o x.gif": "the picture must be a .png, .jpg",
    "visualize notes.jpg --model deit_tiny -o notes.jpg/x.png": "notes.jpg: is a file, expected a folder",
    "visualize notes.jpg --checkpoint empty": "empty is a folder: expected a file of weights, or a run",
    "benchmark deit_smal": UNKNOWN,
    "benchmark deit_tiny --keep-rate 2": RATE,
    "benchmark deit_tiny --batch-size 1 0": "--batch-size must be at least 1, got 0",
    "benchmark deit_tiny --seconds -1": "--seconds must be positive, got -1",
    "benchmark deit_tiny --threads 0": "--threads must be at least 1, got 0",
    "benchmark deit_tiny --latency-calls 0": "--latency-calls must be at least 1, got 0",
    "benchmark deit_tiny --img-size 0": "--img-size must be at least 1, got 0",
    "benchmark deit_tiny --output notes.jpg/x": "notes.jpg: is a file, expected a folder",
    "benchmark deit_tiny --keep-rate 0.7,0.5": "expected numbers such as 0.7, with spaces between them, got",
    "benchmark deit_tiny deit_small": "unrecognized arguments: deit_small; see evit benchmark --help",
    "benchmark resnet18": "ResNet is not supported",
    "export deit_smal --random-weights": UNKNOWN,
    "export nowhere/run": "there is no folder nowhere/run, nor a model of that name",
    "export notes.jpg": "notes.jpg is a file, expected the folder of a run or a model's name",
    "export empty": "empty is not the folder of a run",
    "export deit_tiny": "got none of these",
    "export deit_tiny --checkpoint nowhere.pth": "there is no file nowhere.pth",
    "export deit_tiny --checkpoint empty": "empty is a folder: expected a file of weights, or a run",
    "export deit_tiny --random-weights --keep-rate 0": RATE,
    "export deit_tiny --random-weights --classes nowhere.txt": "nowhere.txt: No such file or directory",
    "export deit_tiny --random-weights --classes binary": "binary must be a text file with a class a line",
    "export deit_tiny --random-weights --format hf --output notes.jpg": "notes.jpg is a file: give a folder",
    "export deit_tiny --random-weights --format hf --opset 18": "--opset is for --format onnx, got",
    "info deit_smal": UNKNOWN,
    "info deit_tiny --keep-rate 0": RATE,
    "info deit_tiny --img-size 7": "should be divisible by patch size (16)",
    "info deit_tiny --budget 0": "--budget must be GMACs, 10^9 multiply-accumulates, above 0",
    "info deit_tiny --budget 4.6e9": "and at most 10000, or a model's name, got 4.6e9",
    "info deit_tiny --budget 1 --tolerance -5": "--tolerance must be from 0 to 100 percent, got -5",
    "eval --model deit_tiny --pretrained --dataset digits": "know 1000 classes, 10 are asked for",
    "visualize notes.jpg --model deit_tiny --pretrained --num-classes 2": "1000 classes, 2 are asked for",
    "export deit_tiny --pretrained --num-classes 10": "know 1000 classes, 10 are asked for",
    "info --nothing": "unrecognized arguments: --nothing; see evit info --help",
    "train --keeprate 0.7": "--keeprate 0.7 (the nearest is --keep-rate); see evit train --help",
    "--nothing info": "unrecognized arguments: --nothing; see evit --help",
    "nothing": "invalid choice: 'nothing'",
}


@pytest.mark.parametrize("line", CASES)
def test_one_line_and_exit_code_2(
    line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("timm.models._builder.load_pretrained", lambda *_, **__: None)  # there is no network
    Path("notes.jpg").write_text("not an image")
    Path("binary").write_bytes(b"\x89PNG")
    Path("empty").mkdir()
    try:
        code = main(line.split())
    except SystemExit as exit_:  # of what argparse itself refuses
        code = exit_.code  # type: ignore[assignment]
    out, error = capsys.readouterr()
    assert code == 2 and not out
    assert error.startswith("evit: error: ") and error.count("\n") == 1
    assert CASES[line] in error
    assert {path.name for path in tmp_path.iterdir()} == {"notes.jpg", "binary", "empty"} and not any(
        Path("empty").iterdir()
    )


@pytest.mark.parametrize("command", ["train", "eval", "visualize", "benchmark", "export", "info"])
def test_help_shows_examples_that_can_be_read(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main([command, "--help"])
    out = capsys.readouterr().out
    assert exit_.value.code == 0 and out.startswith(f"usage: evit {command} ")
    _, found, examples = out.partition("\nexamples:\n")
    lines = [line.partition("#")[0].split() for line in examples.splitlines() if line.strip()]
    assert found and len(lines) >= 3
    for words in lines:
        assert words[words.index("evit") + 1] == command
        parser().parse_args(words[words.index("evit") + 1 :])
