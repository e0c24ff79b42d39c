"""Every command of the shell blocks of README.md, CONTRIBUTING.md and docs/.

Each is checked: options and values of ``evit`` by its own parser, targets by ``make -n``; files, extras and
CMake's options by looking for them. Those of ``evit`` are run, too, in a folder with small stand-ins for
data, runs and weights, and with the further options of `MADE_SMALL`. What is not run stands in `NOT_RUN` with
the reason.
"""

from __future__ import annotations

import argparse
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
from documents import PAGES, ROOT, Command, commands, split
from playground import further_options, prepare

from evit_ext.cli import main

#: Commands that are not run, by a pattern, and why. The first that fits counts.
NOT_RUN = {
    r"evit .*--format aoti": "AOTInductor compiles for a minute; python_tests/export does for a small model",
    r"evit eval .*--exported": "evaluates a file that another command writes; python_tests/cli does, too",
    r"torchrun ": "several processes or machines; python_tests/training runs two processes",
    r"make (demo|bench|env|docs|wheels|real-weights)\b": "minutes, and an environment; its parts have tests",
    r"make study": "hours; python_tests/study runs a small plan",
    r"python -m study .*speed": "minutes; python_tests/study measures a small plan",
    r"make (test|lint|format|gpu-check)": "runs the tests, or what checks the sources beside them",
    r"(\S+/)?pip install": "installs; the environment that this runs in was made by it",
    r"\S+/pre-commit install": "would put a hook into the repository",
    r"(cmake|ctest) ": "make test-cpp and python_tests build with CMake",
    r"build/": "a program of CMake's build; python_tests/export builds and runs it",
    r"python benchmarks/": "minutes; the benchmarks have tests of their own",
    r"(sudo )?apt(-get)? ": "installs packages of the system",
    r"sbatch ": "needs Slurm",
}

COMMANDS = [command for page in PAGES for command in commands(page)]
#: Those of blocks; what several pages have counts once.
TO_RUN = list({command.words: command for command in reversed(COMMANDS) if command.in_block}.values())[::-1]


def name(command: Command) -> str:
    return f"{command.place} {command}"


class Parsed(BaseException):
    """What the parser made of a command; thrown where the command would begin to work."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options


def check_evit(command: Command, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Have the real parser read the arguments, and of ``evit train`` the configuration too."""
    words = list(command.words[1:])
    if not command.in_block and len(words) == 1:
        words.append("--help")  # the name of the command alone
    if words[0] == "train" and "--help" not in words:
        words.append("--print-config")
    else:
        parse = argparse.ArgumentParser.parse_args

        def stop(self: argparse.ArgumentParser, *arguments: Any, **named: Any) -> None:
            raise Parsed(parse(self, *arguments, **named))

        monkeypatch.setattr(argparse.ArgumentParser, "parse_args", stop)
    try:
        status = main(words)
    except Parsed:
        status = 0
    except SystemExit as end:
        status = end.code
    error = capsys.readouterr().err
    if not command.in_block and "arguments are required" in error:
        return  # of a command that is only named, with an option
    assert status == 0, f"{command.place}: `{command}`: {error}"


def check_make(command: Command) -> None:
    run = subprocess.run(["make", "-n", *command.words[1:]], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, f"{command.place}: `{command}`: {run.stderr}"


def check_pip(command: Command) -> None:
    """The extras that are asked for are in pyproject.toml."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    known = set(
        re.findall(r"^(\w+) = \[", text.split("[project.optional-dependencies]")[1].split("\n[")[0], re.M)
    )
    for wanted in re.findall(r"\[([\w,]+)\]", " ".join(command.words)):
        unknown = set(wanted.split(",")) - known
        assert not unknown, f"{command.place}: `{command}`: pyproject.toml has no extra {', '.join(unknown)}"


def check_cmake(command: Command) -> None:
    """The folder has a CMakeLists.txt, which knows the options."""
    words = command.words
    if command.words[0] != "cmake" or "-S" not in words:
        return
    file = ROOT / words[words.index("-S") + 1] / "CMakeLists.txt"
    assert file.is_file(), f"{command.place}: `{command}`: there is no {file.relative_to(ROOT)}"
    for option in re.findall(r"-D(EVIT_\w+)", str(command)):
        assert option in file.read_text(), f"{command.place}: {file.relative_to(ROOT)} has no option {option}"


def check_files(command: Command) -> None:
    """Scripts that the repository should have are there."""
    for word in command.words:
        if re.match(r"(benchmarks|docs|examples|python_tests|scripts)/[\w/.-]+$", word):
            assert (ROOT / word).exists(), f"{command.place}: `{command}`: there is no {word}"


def check(command: Command, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    if command.words[0] == "evit":
        check_evit(command, monkeypatch, capsys)
    elif command.words[0] == "torchrun":
        from torch.distributed.run import parse_args

        options = parse_args(list(command.words[1:]))
        assert options.no_python and options.training_script == "evit"
        check_evit(command._replace(words=("evit", *options.training_script_args)), monkeypatch, capsys)
    elif command.words[0] == "make":
        check_make(command)
    elif "pip" in command.words[:3] or command.words[0].endswith("/pip"):
        check_pip(command)
    elif command.words[0] in ("cmake", "ctest"):
        check_cmake(command)
    else:
        check_files(command)
    assert reason(command) or command.words[0] == "evit" or not command.in_block, (
        f"{command.place}: nothing is known of `{command}`: run it here, or say in NOT_RUN why not"
    )


def reason(command: Command) -> str | None:
    """Why a command is not run, or None."""
    return next((why for pattern, why in NOT_RUN.items() if re.match(pattern, str(command))), None)


@pytest.fixture(scope="module")
def playground(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare(tmp_path_factory.mktemp("playground"))


@pytest.fixture(autouse=True)
def in_playground(playground: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(playground)
    for variable in ("RANK", "WORLD_SIZE", "SLURM_STEP_ID"):
        monkeypatch.delenv(variable, raising=False)


@pytest.mark.parametrize("command", COMMANDS, ids=name)
def test_is_well_formed(
    command: Command, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    check(command, monkeypatch, capsys)


@pytest.mark.parametrize("command", TO_RUN, ids=name)
def test_runs(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    why = reason(command)
    if why:
        pytest.skip(f"{command}: {why}")
    assert command.words[0] == "evit", (
        "only commands of evit are run here: give the reason in NOT_RUN why not"
    )
    monkeypatch.setattr("timm.models._builder.load_pretrained", lambda *_, **__: None)
    monkeypatch.setattr("evit_ext.training.hub._unreachable", lambda *_: "")  # there is a network
    more = further_options(str(command), tmp_path / "new")
    status = main([*command.words[1:], *more])
    out, error = capfd.readouterr()
    assert status in (0, None), f"{command.place}: `{command} {' '.join(more)}`:\n{out}{error}"
    assert out, f"{command.place}: `{command}` printed nothing"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("evit train --recipe cluttered-digits --epochz 3", "unrecognized arguments: --epochz"),
        ("evit train --recipe cluttered-digits --epochs many", "epochs"),
        ("evit train --recipe imagenet-3000", "imagenet-3000"),
        ("evit eval runs/a --keep-rate half", "expected numbers such as 0.7"),
        ("evit inspect runs/a", "invalid choice: 'inspect'"),
        ("torchrun --nproc-per-node 8 --no-python evit train --modell x", "unrecognized arguments: --modell"),
        ("make tset", "No rule to make target"),
        ("pip install '.[trian]'", "no extra trian"),
        ("cmake -S csrc/nowhere -B build", "there is no csrc/nowhere/CMakeLists.txt"),
        ("cmake -S . -B build -DEVIT_LIBRARIES=ON", "has no option EVIT_LIBRARIES"),
        ("python benchmarks/nothing.py", "there is no benchmarks/nothing.py"),
        ("conda install evit", "nothing is known of"),
    ],
)
def test_mistakes_are_seen(
    text: str, message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ((_, words),) = split(text, 1)
    with pytest.raises(AssertionError, match=re.escape(message)):
        check(Command("page.md", 1, words, True), monkeypatch, capsys)
