"""The logic of scripts/build-wheels.py, without compiling: what it finds, what it refuses, what it says."""

from __future__ import annotations

import copy
import importlib.util
import json
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest

from evit_ext import _C

SCRIPTS = Path(__file__).resolve().parents[1] / "scripts"
if not SCRIPTS.exists():
    pytest.skip("tests run without the source tree", allow_module_level=True)
sys.path.insert(0, str(SCRIPTS))

from build_wheels import auditing, building, commands, interpreters  # noqa: E402
from build_wheels.commands import StepError  # noqa: E402
from build_wheels.report import Row, table, verdict  # noqa: E402

WHEEL = "evit_ext-0.1.0+cpu-cp312-cp312-manylinux_2_28_x86_64.whl"
MODULE = "_C.cpython-312-x86_64-linux-gnu.so"


def test_the_table_and_the_verdict_hide_nothing() -> None:
    rows = [
        Row("3.12.1", "cpu", "passed, tried on the CPU", WHEEL, 680_000, "manylinux_2_28_x86_64", "2.15.0"),
        Row("3.12.1", "cuda", "FAILED: no toolkit"),
        Row("3.14", "cpu", "NOT BUILT: no Python 3.14"),
    ]
    lines = table(rows).splitlines()
    assert len(lines) == 4 and WHEEL in lines[1] and "0.68" in lines[1] and "manylinux_2_28" in lines[1]
    assert lines[2].split() == ["3.12.1", "cuda", "–", "–", "–", "–", "FAILED:", "no", "toolkit"]
    assert verdict(rows) == "1 of 3 wheels passed; NOT: 3.12.1 cuda, 3.14 cpu"
    assert [row.passed for row in rows] == [True, False, False]


def test_the_running_python_is_found_first() -> None:
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    assert next(interpreters.candidates(version)) == Path(sys.executable)
    found = interpreters.inspect(sys.executable)
    assert (found.version, found.tag) == (version, f"cp{version.replace('.', '')}")
    assert "torch" not in found.missing and found.packages


def test_pythons_of_other_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for version in ("3.9.18", "3.99.2", "3.99.10"):
        (tmp_path / "versions" / version / "bin").mkdir(parents=True)
        (tmp_path / "versions" / version / "bin" / "python").touch()
    monkeypatch.setenv("PYENV_ROOT", str(tmp_path))
    found = [path.parts[-3] for path in interpreters.candidates("3.99")]
    assert found == ["3.99.10", "3.99.2"]


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ("3.98", "no Python 3.98 in this Python, PATH"),
        ("no-such-python", "no-such-python is no Python that runs: No such file or directory$"),
        (shutil.which("false") or "/bin/false", "false is no Python that runs: no answer$"),
    ],
)
def test_pythons_that_are_not_there(wanted: str, message: str) -> None:
    with pytest.raises(interpreters.NotFoundError, match=message):
        interpreters.find(wanted)


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        ({"free_threaded": True}, "not CPython with its global lock"),
        ({"cpython": False}, "not CPython with its global lock"),
        ({"headers": False}, "is Python 3.12.1 without its headers"),
        ({"version": "3.9", "full_version": "3.9.7"}, "is Python 3.9.7, 3.10 or newer is needed"),
    ],
)
def test_pythons_that_nothing_can_be_built_for(facts: dict[str, Any], message: str, tmp_path: Path) -> None:
    good = {"full_version": "3.12.1", "version": "3.12", "cpython": True, "free_threaded": False}
    good.update(headers=True, missing=["torch"], packages=[])
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\necho '{json.dumps(good)}'\n")
    python.chmod(0o755)
    assert interpreters.inspect(python).missing == ("torch",)
    python.write_text(f"#!/bin/sh\necho '{json.dumps({**good, **facts})}'\n")
    with pytest.raises(interpreters.NotFoundError, match=message):
        interpreters.inspect(python)


def test_a_failed_command_says_why(tmp_path: Path) -> None:
    log = tmp_path / "log"
    code = "print('evit_ext: error: no compiler'); print('error: metadata-failed'); raise SystemExit(3)"
    with pytest.raises(StepError, match=r"^evit_ext: error: no compiler \(log\)$"):
        commands.run([sys.executable, "-c", code], log)
    assert "metadata-failed" in log.read_text()
    with pytest.raises(StepError, match="no-such-program cannot be run"):
        commands.run(["no-such-program"], log)
    with pytest.raises(StepError, match=r"exit status 3 \(log\)"):
        commands.run([sys.executable, "-c", "raise SystemExit(3)"], log)
    output = (
        "a.cpp:3:5: error: first\na.cpp:9:5: error: second\nninja: build stopped\nRuntimeError: compiling"
    )
    assert commands.telling_line(output) == "a.cpp:3:5: error: first"


def test_requirements_are_those_of_the_project() -> None:
    found = building.requirements()
    assert {"pybind11>=2.13", "ninja", "torch>=2.10", "timm>=1.0.15", "safetensors"} <= set(found)


def test_a_failed_build_leaves_no_wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not one of an earlier run either, which would pass for one of this."""
    monkeypatch.setattr(building, "WORK", tmp_path)
    others = [f"evit_ext-0.1.0+cu130-{tag}-linux_x86_64.whl" for tag in ("cp311-cp311", "cp312-cp312")]
    for name in (WHEEL, *others):
        (tmp_path / name).touch()
    builder = building.Builder.__new__(building.Builder)
    builder._output, builder._scratch = tmp_path, tmp_path / "scratch"
    (tmp_path / "evit_ext-0.1.0").mkdir()
    packed = shutil.make_archive(str(tmp_path / "evit_ext-0.1.0"), "gztar", tmp_path, "evit_ext-0.1.0")
    builder.sdist = Path(packed)
    false = Path(shutil.which("false") or "/bin/false")
    environment = interpreters.Interpreter(false, "3.12", "3.12.1", (), ())
    row = builder.wheel(environment, "cpu")
    assert (row.python, row.variant, row.verdict) == (
        "3.12.1",
        "cpu",
        "FAILED: exit status 1 (cp312-cpu.log)",
    )
    assert {path.name for path in tmp_path.glob("*.whl")} == set(others)
    builder.wheel(environment, "cuda")
    assert [path.name for path in tmp_path.glob("*.whl")] == others[:1]


@pytest.fixture
def program(monkeypatch: pytest.MonkeyPatch) -> Any:
    """scripts/build-wheels.py, with a source distribution that takes no time."""
    spec = importlib.util.spec_from_file_location("build_wheels_program", SCRIPTS / "build-wheels.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "TOOLS", {})

    def begin(builder: Any, output: Path) -> None:
        builder._output, builder.sdist = output, output / "evit_ext-0.1.0.tar.gz"

    monkeypatch.setattr(building.Builder, "__init__", begin)
    return module


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        (StepError("no compiler"), 1, "FAILED: no compiler"),
        (ValueError("no wheel\nat all"), 1, "FAILED: ValueError: no wheel (cp312-c"),
        (
            OSError(28, "No space left on device"),
            1,
            "FAILED: OSError: [Errno 28] No space left on device (cp",
        ),
        (KeyboardInterrupt(), 130, "NOT BUILT: interrupted"),
    ],
)
def test_the_table_is_there_whatever_happens(
    program: Any,
    error: BaseException,
    status: int,
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(*arguments: object) -> None:
        raise error

    found = interpreters.Interpreter(Path(sys.executable), "3.12", "3.12.1", (), ())
    for module in (building, program):
        monkeypatch.setattr(module, "WORK", tmp_path)
    monkeypatch.setattr(program, "find", lambda wanted: found)
    monkeypatch.setattr(building.Builder, "_scratch", tmp_path / "scratch", raising=False)
    monkeypatch.setattr(building.Builder, "_build", fail)
    assert program.main(["--python", "3.12", "--python", "3.13", "--output", str(tmp_path)]) == status
    table = capsys.readouterr().out.partition("\npython ")[2].splitlines()
    assert [said in line for line in table[1:5]] == [True] * 4 and table[6].startswith("0 of 4 wheels passed")
    if isinstance(error, ValueError):
        assert "Traceback" in (tmp_path / "cp312-cpu.log").read_text()


def test_an_environment_that_cannot_be_made(
    program: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*arguments: object) -> None:
        raise PermissionError(13, "Permission denied", "build/wheels")

    monkeypatch.setattr(program, "WORK", tmp_path)
    monkeypatch.setattr(program, "find", lambda wanted: wanted)
    monkeypatch.setattr(building.Builder, "environment", fail)
    assert program.main(["--python", "3.12", "--variant", "cpu", "--output", str(tmp_path / "dist")]) == 1
    out = capsys.readouterr().out
    assert "NOT BUILT: PermissionError: [Errno 13]" in out and "0 of 1 wheels passed; NOT: 3.12 cpu" in out


def test_an_output_that_is_a_file(program: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "dist").touch()
    assert program.main(["--output", str(tmp_path / "dist")]) == 2
    assert capsys.readouterr().err == (
        f"build-wheels: error: no output folder {tmp_path / 'dist'}: File exists\n"
    )


def test_a_wheel_is_put_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fill(source: Path, target: Path) -> None:
        Path(target).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    builder = building.Builder.__new__(building.Builder)
    builder._output = tmp_path
    monkeypatch.setattr(building.shutil, "copy2", fill)
    with pytest.raises(OSError, match="No space left"):
        builder._put(tmp_path / "elsewhere" / WHEEL)
    assert not any(tmp_path.iterdir())


def make_wheel(folder: Path, *others: str, version: str = "0.1.0+cpu", module: str = MODULE) -> Path:
    """A wheel of two modules, and the source that it says it is of."""
    (folder / "source" / "evit_ext").mkdir(parents=True)
    wheel = folder / WHEEL
    info = "evit_ext-0.1.0+cpu.dist-info"
    metadata = ("RECORD", "WHEEL", "entry_points.txt", "top_level.txt", "licenses/LICENSE")
    with zipfile.ZipFile(wheel, "w") as archive:
        for name in ("__init__.py", "page.html"):
            (folder / "source" / "evit_ext" / name).touch()
            archive.writestr(f"evit_ext/{name}", "")
        archive.writestr(f"evit_ext/{module}", "")
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.4\nName: evit_ext\nVersion: {version}\n")
        for name in (*(f"{info}/{name}" for name in metadata), *others):
            archive.writestr(name, "")
    return wheel


def test_contents(tmp_path: Path) -> None:
    wheel = make_wheel(tmp_path / "good")
    auditing.check_contents(wheel, tmp_path / "good" / "source")
    (tmp_path / "good" / "source" / "evit_ext" / "forgotten.yaml").touch()
    with pytest.raises(StepError, match=r"missing \['evit_ext/forgotten.yaml'\], not expected nothing"):
        auditing.check_contents(wheel, tmp_path / "good" / "source")
    for other in ("python_tests/test_apply.py", "evit_ext.libs/libtorch.so", "evit_ext/left.py"):
        wheel = make_wheel(tmp_path / other, other)
        with pytest.raises(StepError, match=rf"missing nothing, not expected \['{other}'\]"):
            auditing.check_contents(wheel, tmp_path / other / "source")
    wheel = make_wheel(tmp_path / "none", module="_C.so")
    with pytest.raises(StepError, match="expected one compiled module"):
        auditing.check_contents(wheel, tmp_path / "none" / "source")


def test_variants_are_told_apart(tmp_path: Path) -> None:
    wheel = make_wheel(tmp_path / "good")
    auditing.check_variant(wheel, "cpu")
    with pytest.raises(StepError, match="expected the cuda variant by its version, got '0.1.0\\+cpu'"):
        auditing.check_variant(wheel, "cuda")
    with pytest.raises(StepError, match=r"got '0.1.0' in evit_ext-0.1.0\+cpu-"):
        auditing.check_variant(make_wheel(tmp_path / "other", version="0.1.0"), "cpu")


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What torch-abi-audit says of the module that is in use."""
    if importlib.util.find_spec("torch_abi_audit") is None:
        pytest.skip("torch-abi-audit is not installed")
    package = tmp_path_factory.mktemp("abi") / "evit_ext"
    package.mkdir()
    (package / "__init__.py").touch()
    shutil.copy2(str(_C.__file__), package)
    command = [auditing.tool("torch-abi-audit"), "--json", str(package)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return dict(json.loads(done.stdout))


def test_the_module_uses_torchs_stable_abi_only(report: dict[str, Any]) -> None:
    auditing.judge_torch_abi(report)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"unstable_symbols": ["_ZN2at5emptyE"], "stable": False}, "not of the stable ABI: _ZN2at5emptyE"),
        ({"unknown_shim_symbols": ["aoti_torch_new"]}, "not of the stable ABI: aoti_torch_new"),
        ({"min_torch_version": "2.11.0"}, "needs torch 2.11.0, 2.10 is promised"),
        ({"uses_torch": False}, "the module was not understood"),
    ],
)
def test_other_uses_of_torch_are_refused(
    report: dict[str, Any], change: dict[str, Any], message: str
) -> None:
    changed = copy.deepcopy(report)
    changed["extensions"][0]["torch"].update(change)
    with pytest.raises(StepError, match=message):
        auditing.judge_torch_abi(changed)


def test_bundled_libraries_are_refused(report: dict[str, Any]) -> None:
    with pytest.raises(StepError, match="expected one module and no libraries"):
        auditing.judge_torch_abi({**report, "bundled_libs": ["evit_ext.libs/libtorch_cpu.so"]})
