"""Calls in processes of their own."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from evit_ext.benchmark import Apart, Contestant, apart, contestants, measure, time_in_turns
from evit_ext.benchmark.settings import read_settings
from evit_ext.ops import library

TINY = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 4, "num_heads": 2, "num_classes": 10}


def notes(file: Path) -> Callable[[], None]:
    """Return what writes down its process and its threads."""

    def note() -> None:
        time.sleep(0.01)
        with file.open("a") as lines:
            lines.write(f"{os.getpid()} {torch.get_num_threads()}\n")

    return note


def writes_settings(file: Path) -> Callable[[], None]:
    found = pickle.dumps(read_settings())
    return lambda: file.write_bytes(found) and None


CHANGES: dict[str, Callable[[], object]] = {
    "default dtype": lambda: torch.set_default_dtype(torch.bfloat16),
    "default device": lambda: torch.set_default_device("meta"),
    "deterministic algorithms": lambda: torch.use_deterministic_algorithms(True, warn_only=True),
    "attention": lambda: (
        torch.backends.cuda.enable_flash_sdp(False),
        torch.backends.cuda.enable_mem_efficient_sdp(False),
        torch.backends.cuda.enable_math_sdp(False),
        torch.backends.cuda.enable_cudnn_sdp(False),
        torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(True),
    ),
    "float32 products": lambda: torch.set_float32_matmul_precision("medium"),
    "float32 of a backend": lambda: setattr(torch.backends.cuda.matmul, "fp32_precision", "ieee"),
    "float32 of all backends": lambda: setattr(torch.backends, "fp32_precision", "tf32"),
    "libraries": lambda: (
        setattr(torch.backends.mkldnn, "enabled", False),
        setattr(torch.backends.mkldnn, "deterministic", True),
        setattr(torch.backends.cudnn, "benchmark", True),
        setattr(torch.backends.cuda.matmul, "allow_bf16_reduced_precision_reduction", False),
        setattr(torch.utils.deterministic, "fill_uninitialized_memory", False),
    ),
    "our own": lambda: setattr(library, "CUDA_ATTENTION", True),
}

# argv: a folder. In a process of its own, so that no other test sees what it changes.
_CARRIES = """
import pickle, sys
from pathlib import Path
import torch
from evit_ext.benchmark import Apart
from evit_ext.benchmark.settings import read_settings
from benchmark.test_apart import CHANGES, writes_settings

if __name__ == "__main__":
    torch.set_num_threads(3)
    torch.set_num_interop_threads(5)
    for name, change in CHANGES.items():
        before = read_settings()
        change()
        here = read_settings()
        assert here != before, name
        file = Path(sys.argv[1]) / "settings"
        call = Apart(writes_settings, file)
        call.seconds()
        call.close()
        there = pickle.loads(file.read_bytes())
        different = {key for key in here.keys() | there.keys() if here.get(key) != there.get(key)}
        assert not different, (name, different)
        print(name)
"""


def takes_memory(mib: int) -> Callable[[], object]:
    return lambda: torch.ones(mib * 2**20, dtype=torch.uint8)


def waits(seconds: float) -> Callable[[], None]:
    return lambda: time.sleep(seconds)


def fails(when: str) -> Callable[[], object]:
    if when == "made":
        raise ValueError("no such thing")
    if when == "killed":
        return lambda: os.kill(os.getpid(), signal.SIGKILL)
    raise_error: Callable[[], object] = lambda: [][0]  # noqa: E731
    return raise_error


def test_each_call_has_a_process_and_the_threads_of_this_one(tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        with apart({name: (notes, (tmp_path / name,)) for name in "ab"}) as calls:
            times = time_in_turns(calls, seconds=0.0, least=2)
            processes = [call._process for call in calls.values()]
            assert all(process.is_alive() for process in processes)
    finally:
        torch.set_num_threads(threads)
    assert not any(process.is_alive() for process in processes)
    assert all(0.01 <= taken < 1 for taken in times["a"] + times["b"])
    found = [set((tmp_path / name).read_text().splitlines()) for name in "ab"]
    assert found == [{f"{process.pid} 3"} for process in processes] and found[0] != found[1]
    assert (tmp_path / "a").read_text().count("\n") == 4  # two of them untimed


def test_settings_are_those_of_this_process(tmp_path: Path) -> None:
    file = tmp_path / "program.py"
    file.write_text(_CARRIES)
    # ONNX Runtime's quantizer, if another test has run it, puts a folder there that has a benchmark.py.
    paths = [str(Path(__file__).parents[1]), *(path for path in sys.path if "onnxruntime" not in path)]
    done = subprocess.run(
        [sys.executable, file, str(tmp_path)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout.splitlines()) == (0, list(CHANGES)), done.stderr


def test_memory_is_that_of_the_process() -> None:
    kept = torch.ones(64 * 2**20, dtype=torch.uint8)
    with apart({"call": (takes_memory, (32,))}) as calls:
        calls["call"].seconds()  # the first call has 5 MiB of torch's own code become resident, too
        added = calls["call"].memory()
    assert kept.sum() == 64 * 2**20
    if added is None:
        pytest.skip("only Linux counts a peak anew")
    assert 31 * 2**20 <= added <= 36 * 2**20


def test_what_fails_there_is_said_here() -> None:
    with pytest.raises(RuntimeError, match="in a process that was measured: ValueError: no such thing"):
        Apart(fails, "made")
    assert not multiprocessing.active_children()
    with apart({"call": (fails, ("called",))}) as calls:
        for _ in range(2):  # and the process stays
            with pytest.raises(RuntimeError, match="IndexError: list index out of range"):
                calls["call"].seconds()
    with (
        apart({"call": (fails, ("killed",))}) as calls,
        pytest.raises(RuntimeError, match="has ended, with exit status -9"),
    ):
        calls["call"].seconds()
    with (
        apart({"call": (takes_memory, (1,))}) as calls,
        pytest.raises(RuntimeError, match="has ended, with exit status -9$"),
    ):
        calls["call"]._process.kill()  # while it waits, as where memory is short
        calls["call"]._process.join()
        calls["call"].seconds()


def test_it_ends_in_the_midst_of_a_call() -> None:
    call = Apart(waits, 60.0)
    call._line.send_bytes(b"seconds")
    time.sleep(0.1)
    start = time.monotonic()
    call.close()
    assert time.monotonic() - start < 30 and not call._process.is_alive()


def test_where_there_is_no_fork_server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys.modules[Apart.__module__], "METHOD", "spawn")
    with apart({"call": (notes, (tmp_path / "note",))}) as calls:
        assert 0.01 <= calls["call"].seconds() < 1
    assert (tmp_path / "note").read_text().count("\n") == 1


def run_program(folder: Path, program: str) -> subprocess.CompletedProcess[str]:
    """Run a program in a session of its own, as Ctrl-C reaches all processes of a terminal's."""
    file = folder / "program.py"
    file.write_text(f"from evit_ext.benchmark import Apart\n{program}")
    # Into files: processes that stay would hold pipes open.
    with (folder / "out").open("w") as out, (folder / "err").open("w") as err:
        done = subprocess.run([sys.executable, file], stdout=out, stderr=err, start_new_session=True)
    said = [(folder / name).read_text() for name in ("out", "err")]
    return subprocess.CompletedProcess(done.args, done.returncode, *said)


def test_a_program_that_measures_when_it_is_imported(tmp_path: Path) -> None:
    done = run_program(tmp_path, "Apart(print)\n")
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert last.startswith("RuntimeError: a process that was measured has ended, with exit status 1")
    assert 'below `if __name__ == "__main__":`' in last


def test_interrupted_while_the_first_process_is_made(tmp_path: Path) -> None:
    """The fork server, which imports for seconds by then, does not speak of it."""
    program = """
import functools, os, signal, threading, time
if __name__ == "__main__":
    # As in a terminal: a shell without job control has its background jobs, and so their tests, ignore it.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    threading.Timer(0.5, os.killpg, (0, signal.SIGINT)).start()
    try:
        Apart(functools.partial, time.sleep, 10).seconds()
        print("made")
    except KeyboardInterrupt:
        print("interrupted")
"""
    done = run_program(tmp_path, program)
    assert (done.returncode, done.stdout, done.stderr) == (0, "interrupted\n", "")


def test_what_cannot_be_pickled() -> None:
    model = nn.Linear(2, 2)
    model.register_forward_hook(lambda *_: None)
    with pytest.raises(TypeError, match="must be picklable: .*lambda.*apart=False"):
        measure([Contestant("hooked", model, 1.0, None)], torch.randn(2, 2))


def test_training_there_leaves_the_weights_here_alone() -> None:
    models = contestants("vit_tiny_patch16_224", (0.7,), **TINY)
    before = [{key: value.clone() for key, value in m.model.state_dict().items()} for m in models]
    rows = measure(models, torch.randn(2, 3, 32, 32), "training", seconds=0.0)
    assert [row.model for row in rows] == ["dense", "EViT 0.7"]
    for model, state in zip(models, before, strict=True):
        assert all(torch.equal(value, state[key]) for key, value in model.model.state_dict().items())
