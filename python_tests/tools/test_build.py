"""Tests of the build: what it says about itself, and one clear sentence where it cannot go on."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path
from types import ModuleType

import pytest
import torch

import evit_ext
from evit_ext import _C
from evit_ext.ops import library

ROOT = Path(__file__).resolve().parents[2]


def test_build_info() -> None:
    info = _C.build_info()
    assert info["version"] == evit_ext.__version__
    assert info["cpu_capability"] in info["cpu_capabilities"]
    assert info["cpu_capabilities"][0] == "baseline"
    assert re.fullmatch(r"\d+\.\d+.*", info["built_with_torch"])
    assert info["minimum_torch"] == "2.10"
    assert (info["cuda"] is None) == (info["cuda_architectures"] == "")


def test_the_module_uses_torchs_stable_abi_only() -> None:
    """And of that, nothing newer than torch 2.10: one binary serves all of them."""
    pytest.importorskip("torch_abi_audit")
    command = [str(Path(sys.executable).with_name("torch-abi-audit")), "--json", _C.__file__]
    report = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    (extension,) = report["extensions"]
    use = extension["torch"]
    assert use["uses_torch"] and use["stable"], use
    assert [*use["unstable_symbols"], *use["unknown_shim_symbols"]] == []
    assert [int(number) for number in use["min_torch_version"].split(".")[:2]] <= [2, 10]


def test_cuda_self_test_says_what_is_missing() -> None:
    message = _C.cuda_self_test()
    if torch.cuda.is_available() and _C.build_info()["cuda"]:
        assert message == ""
    else:
        assert message


def capability(wanted: str) -> str:
    code = "import torch; from evit_ext import _C; print(_C.build_info()['cpu_capability'])"
    environment = {**os.environ, "EVIT_CPU_CAPABILITY": wanted}
    run = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    return run.stdout.strip()


@pytest.mark.parametrize("level", _C.build_info()["cpu_capabilities"])
def test_cpu_capability_can_be_lowered(level: str) -> None:
    assert capability(level) == level


def test_unknown_cpu_capability_is_the_lowest_and_warned_about() -> None:
    assert capability("avx1024") == "baseline"
    unasked = [level for level in _C.build_info()["cpu_capabilities"] if level != "amx_bf16"]
    assert capability("") == unasked[-1]
    run = subprocess.run(
        [sys.executable, "-c", "import evit_ext"],
        env={**os.environ, "EVIT_CPU_CAPABILITY": "AVX2"},
        capture_output=True,
        text=True,
        check=True,
    )
    levels = "baseline, avx2, avx512, avx512_bf16, amx_bf16"
    assert f"EVIT_CPU_CAPABILITY must be one of {levels}, got 'AVX2'" in run.stderr


def test_a_level_that_the_processor_lacks_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "build_info", lambda: {"cpu_capability": "avx2"})
    with pytest.warns(UserWarning, match="asks for amx_bf16, which this machine .* the operators use avx2"):
        library._warn_of_capability("amx_bf16")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for fine in (None, "", "avx2"):
            library._warn_of_capability(fine)


def setup(command: str = "--version", **environment: str) -> subprocess.CompletedProcess[str]:
    """Run setup.py, which makes all its choices before it does anything."""
    return subprocess.run(
        [sys.executable, "setup.py", *command.split()],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )


needs_source = pytest.mark.skipif(
    not (ROOT / "setup.py").exists(), reason="tests run without the source tree"
)


@needs_source
def test_setup_prints_its_choices_and_the_version() -> None:
    run = setup(FORCE_CUDA="0", MAX_JOBS="3")
    assert run.returncode == 0, run.stderr
    assert "evit_ext: CUDA: off (FORCE_CUDA=0)" in run.stdout
    assert "evit_ext: jobs: 3" in run.stdout
    assert "-std=c++20 -O3" in run.stdout
    assert run.stdout.strip().splitlines()[-1] == evit_ext.__version__


@needs_source
def test_setup_limits_jobs() -> None:
    environment = {key: value for key, value in os.environ.items() if key != "MAX_JOBS"}
    run = subprocess.run(
        [sys.executable, "setup.py", "--version"],
        cwd=ROOT,
        env={**environment, "FORCE_CUDA": "0"},
        capture_output=True,
        text=True,
    )
    jobs = int(re.search(r"jobs: (\d+)", run.stdout)[1])  # type: ignore[index]
    assert 1 <= jobs <= (os.cpu_count() or 1)


@needs_source
def test_missing_compiler() -> None:
    run = setup(CXX="no-such-compiler")
    assert run.returncode != 0
    assert "no C++ compiler `no-such-compiler` found: install one" in run.stderr
    assert "Traceback" not in run.stderr


@needs_source
def test_variables_set_to_nothing() -> None:
    """As `CXX= pip install .` does: the same as not set."""
    run = setup(CXX=" ", MAX_JOBS="", FORCE_CUDA="0")
    assert run.returncode == 0, run.stderr
    assert "evit_ext: C++: c++ -std=c++20" in run.stdout and re.search(r"jobs: \d", run.stdout)


@needs_source
@pytest.mark.parametrize("jobs", ["lots", "0", "9" * 10**4 + "x"])
def test_jobs_that_are_no_number(jobs: str) -> None:
    run = setup(MAX_JOBS=jobs, FORCE_CUDA="0")
    assert run.returncode != 0 and "Traceback" not in run.stderr
    assert "evit_ext: error: MAX_JOBS must be a whole number, 1 or more, got '" in run.stderr
    assert len(run.stderr) < 500


@pytest.fixture
def setup_module(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """setup.py as a module, with no CUDA toolkit on this machine unless a test makes one."""
    spec = importlib.util.spec_from_file_location("evit_setup", ROOT / "setup.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "toolkit_candidates", list)
    monkeypatch.setattr(torch.version, "cuda", "13.2")
    for name in ("FORCE_CUDA", "TORCH_CUDA_ARCH_LIST"):
        monkeypatch.delenv(name, raising=False)
    return module


def make_toolkit(folder: Path, release: str, header: bool = True) -> str:
    """A folder that looks like a CUDA toolkit."""
    (folder / "bin").mkdir(parents=True)
    (folder / "include").mkdir()
    nvcc = folder / "bin" / "nvcc"
    nvcc.write_text(f"#!/bin/sh\necho 'Cuda compilation tools, release {release}, V{release}.1'\n")
    nvcc.chmod(0o755)
    if header:
        (folder / "include" / "cuda_runtime.h").touch()
    return str(folder)


@needs_source
def test_cuda_is_off_without_a_toolkit(
    setup_module: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert setup_module.choose_cuda() is None
    assert "needs a CUDA 13 toolkit and there is none" in capsys.readouterr().out
    monkeypatch.setenv("FORCE_CUDA", "1")
    with pytest.raises(
        SystemExit, match="FORCE_CUDA=1, but torch .*: install a fitting toolkit or set CUDA_HOME"
    ):
        setup_module.choose_cuda()


@needs_source
def test_cuda_is_off_where_torch_has_none(
    setup_module: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    toolkit = make_toolkit(tmp_path / "cuda", "13.0")
    monkeypatch.setattr(setup_module, "toolkit_candidates", lambda: [toolkit])
    monkeypatch.setattr(torch.version, "cuda", None)
    assert setup_module.choose_cuda() is None


@needs_source
def test_the_toolkit_of_torchs_major_version_is_taken(
    setup_module: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    other = make_toolkit(tmp_path / "cuda-12.8", "12.8")
    incomplete = make_toolkit(tmp_path / "incomplete", "13.1", header=False)
    fitting = make_toolkit(tmp_path / "cuda-13.0", "13.0")
    candidates = [str(tmp_path / "none"), other, incomplete, fitting]
    monkeypatch.setattr(setup_module, "toolkit_candidates", lambda: candidates)
    assert setup_module.choose_cuda() == (fitting, (13, 0))
    monkeypatch.setenv("FORCE_CUDA", "0")
    assert setup_module.choose_cuda() is None
    monkeypatch.setenv("FORCE_CUDA", "1")
    candidates.pop()
    with pytest.raises(SystemExit, match=r"there is none \(found 12.8 in .*cuda-12.8\)"):
        setup_module.choose_cuda()


@needs_source
def test_nvcc_may_be_a_wrapper_script(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    spec = importlib.util.spec_from_file_location("evit_setup", ROOT / "setup.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    wrapper = tmp_path / "bin" / "nvcc"
    wrapper.parent.mkdir()
    wrapper.write_text("#!/bin/sh\necho '#$ _HERE_=/opt/somewhere/cuda/bin' >&2\n")
    wrapper.chmod(0o755)
    monkeypatch.setenv("PATH", str(wrapper.parent), prepend=os.pathsep)
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.delenv("CUDA_PATH", raising=False)
    assert next(iter(module.toolkit_candidates())) == "/opt/somewhere/cuda"


@needs_source
def test_torch_that_is_too_old(setup_module: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    setup_module.check_torch()
    for version in ("2.9.1+cu128", "1.13.0"):
        monkeypatch.setattr(torch, "__version__", version)
        with pytest.raises(SystemExit, match="torch 2.10 or newer is needed"):
            setup_module.check_torch()


@needs_source
def test_architectures(setup_module: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    assert setup_module.architectures((13, 0)) == "8.0;8.6;8.9;9.0;10.0;12.0+PTX"
    assert setup_module.architectures((12, 6)) == "8.0;8.6;8.9;9.0+PTX"
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "9.0")
    assert setup_module.architectures((13, 0)) == "9.0"


@needs_source
def test_architectures_of_the_gpus_here(setup_module: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "native")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="is native, and torch sees no GPU here: name the compute"):
        setup_module.architectures((13, 0))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda number: (9, 0) if number else (8, 6))
    assert setup_module.architectures((13, 0)) == "8.6;9.0"


@needs_source
@pytest.mark.parametrize("asked", ["9", "sm_90", "8.0,9.0", "x" * 10**4, "native 9.0"])
def test_architectures_that_are_none(
    setup_module: ModuleType, monkeypatch: pytest.MonkeyPatch, asked: str
) -> None:
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", asked)
    with pytest.raises(SystemExit, match="TORCH_CUDA_ARCH_LIST has .*: expected compute capabil") as caught:
        setup_module.architectures((13, 0))
    assert len(str(caught.value)) < 300


@needs_source
def test_a_folder_that_cannot_be_written_to(
    setup_module: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    setup_module.check_folder()
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # as of a read-only file system
    with pytest.raises(SystemExit, match="the folder of the sources, .*, cannot be written to"):
        setup_module.main()


@needs_source
def test_architectures_before_8_0_are_left_out(
    setup_module: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "7.5 8.0 9.0a;10.0 12.0+PTX")
    assert setup_module.architectures((13, 0)) == "8.0;9.0a;10.0;12.0+PTX"
    assert "without 7.5 of TORCH_CUDA_ARCH_LIST" in capsys.readouterr().out
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "7.0;7.5+PTX")
    with pytest.raises(SystemExit, match=r"is 7\.0 7\.5\+PTX, but the CUDA kernels need .* 8\.0"):
        setup_module.architectures((13, 0))


@needs_source
def test_force_cuda_must_be_0_or_1() -> None:
    run = setup(FORCE_CUDA="yes")
    assert run.returncode != 0
    assert "FORCE_CUDA must be 0 or 1, got 'yes'." in run.stderr


@needs_source
def test_the_version_can_name_the_variant(setup_module: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    toolkit = ("/usr/local/cuda", (13, 0))
    for asked in ("", "0"):
        monkeypatch.setenv("EVIT_NAME_VARIANT", asked)
        assert setup_module.local_version(toolkit) == setup_module.local_version(None) == ""
    monkeypatch.setenv("EVIT_NAME_VARIANT", "1")
    assert setup_module.local_version(toolkit) == "+cu130"
    assert setup_module.local_version(None) == "+cpu"
    monkeypatch.setenv("EVIT_NAME_VARIANT", "cpu")
    with pytest.raises(SystemExit, match="EVIT_NAME_VARIANT must be 0 or 1, got 'cpu'"):
        setup_module.local_version(None)


@needs_source
def test_a_torch_that_cannot_be_imported_is_not_said_to_be_missing(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise ImportError('libcudart.so: no such file')")
    run = setup(PYTHONPATH=str(tmp_path))
    assert run.returncode != 0 and "Traceback" not in run.stderr
    assert "the one that is installed cannot be imported: libcudart.so: no such file" in run.stderr
    (tmp_path / "torch.py").write_text("raise ModuleNotFoundError(name='torch')")
    run = setup(PYTHONPATH=str(tmp_path))
    assert "torch is needed to build: run `pip install torch`" in run.stderr


@needs_source
def test_one_list_of_sources_names_every_source() -> None:
    build = json.loads((ROOT / "csrc" / "build.json").read_text())
    listed = {path for value in build.values() if isinstance(value, list) for path in value if "/" in path}
    present = {str(p.relative_to(ROOT)) for kind in ("*.cpp", "*.cu") for p in (ROOT / "csrc").rglob(kind)}
    assert listed == present
