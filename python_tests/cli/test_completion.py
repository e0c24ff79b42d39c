"""evit --completion: the scripts in the shells that they are for."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from evit_ext import models
from evit_ext.cli import main

# As the tab key does it: the words of the line, and the function that is registered for the command.
_BASH = """
source "$1"; shift
COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); COMP_LINE="$*"; COMP_POINT=${#COMP_LINE}
$(complete -p evit | sed 's/.*-F \\([^ ]*\\) .*/\\1/')
printf '%s\\n' "${COMPREPLY[@]}"
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "photo.jpg").touch()
    (tmp_path / "runs").mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(shell: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    pytest.importorskip("shtab")
    with pytest.raises(SystemExit) as exit_:
        main(["--completion", shell])
    assert exit_.value.code == 0
    file = folder / "script"
    file.write_text(capsys.readouterr().out)
    return file


def complete(shell: str, script: Path, words: tuple[str, ...]) -> set[str]:
    command = ["bash", "-c", _BASH, "bash", str(script), *words]
    if shell == "fish":
        command = ["fish", "-c", f"source {script}; complete -C '{' '.join(words)}'"]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {line.partition("\t")[0] for line in out.splitlines() if line}


@pytest.mark.parametrize("shell", ["bash", "fish"])
def test_what_the_tab_key_gives(shell: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if shutil.which(shell) is None:
        pytest.skip(f"there is no {shell} in the PATH")
    script = write(shell, folder, capsys)
    expected: dict[tuple[str, ...], set[str]] = {
        ("evit", "in"): {"info"},
        ("evit", "info", "deit_small_2"): {"deit_small_256", "deit_small_272", "deit_small_288"},
        ("evit", "info", "--bud"): {"--budget"},
        ("evit", "benchmark", "lv"): {name for name in models.__all__ if name.startswith("lv")},
        ("evit", "train", "--recipe", "clut"): {"cluttered-digits"},
        ("evit", "export", "deit_small_30"): {"deit_small_304"},
        ("evit", "visualize", "pho"): {"photo.jpg"},
    }
    for words, choices in expected.items():
        assert complete(shell, script, words) == choices, words
    for words in (("evit", "export", "ru"), ("evit", "eval", "ru")):
        assert {name.rstrip("/") for name in complete(shell, script, words)} == {"runs"}, words


def test_zsh_reads_the_script(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    script = write("zsh", folder, capsys)
    assert script.read_text().startswith("#compdef evit\n")
    if shutil.which("zsh") is None:
        pytest.skip("there is no zsh in the PATH")
    subprocess.run(["zsh", "-n", str(script)], check=True)


def test_without_shtab(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "shtab", None)
    with pytest.raises(SystemExit) as exit_:
        main(["--completion", "bash"])
    assert exit_.value.code == 2
    assert "error: --completion needs shtab: pip install 'evit_ext[completion]'" in capsys.readouterr().err
