"""An index out of range on a GPU ends in an assertion on the device, before anything is read or written.

Each case runs in a process of its own, whose CUDA context it destroys. The wrong numbers point so far away
that an access would be reported as what it is, an illegal memory access, and not as a failed assertion.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="CUDA: torch.cuda.is_available() is False"
)

Runs = dict[str, tuple["subprocess.Popen[bytes]", Path]]

BEGIN = """
import torch
from evit_ext import ops
x = torch.ones(2, 5, 8, device="cuda")
weights = torch.ones(2, 5, device="cuda")
def index(wrong):
    return torch.tensor([[0, 1, 2], [0, wrong, 2]], device="cuda")
def kept(wrong):
    return torch.tensor([[0, 1, 2, 3], [0, 1, 3, wrong]], device="cuda")
backward = torch.ops.evit.restore_tokens_backward
torch.cuda.synchronize()
print("ready", flush=True)
"""
END = """
torch.cuda.synchronize()
print("nothing happened", flush=True)
"""
FAR = 2**40
# Not reorganize_tokens_backward: it stays within bounds without an assertion, and the result means nothing.
CALLS = {
    "gather_tokens": "ops.gather_tokens(x, index({wrong}))",
    "scatter_tokens": "ops.scatter_tokens(x[:, :3], index({wrong}), 5)",
    "fuse_tokens": "ops.fuse_tokens(x, weights, index({wrong}))",
    "merge_tokens": "ops.merge_tokens(x, index({wrong}), 5, None, 2)",
    "merge_tokens_backward": (
        "torch.ops.evit.merge_tokens_backward(x[:, :4], weights[:, :2], x, index({wrong}), weights[:, 2:], 2)"
    ),
    "restore_tokens": "ops.restore_tokens(x, kept({wrong}), 5, 1, 'zero')",
    "restore_tokens_backward": "backward(torch.ones(2, 6, 8, device='cuda'), kept({wrong}), 5, 1, False)",
    "restore_tokens_backward, sum": "backward(torch.ones(2, 6, 8, device='cuda'), kept({wrong}), 6, 1, True)",
    "fuse_tokens_backward": "torch.ops.evit.fuse_tokens_backward(x[:, 0], x, weights, index({wrong}))",
}
CASES = {
    f"{name}, {number}": call.format(wrong=wrong)
    for name, call in CALLS.items()
    for number, wrong in (("far", FAR), ("negative", -FAR), ("next", 5))
}
CASES["restore_tokens, not ascending"] = CALLS["restore_tokens"].format(wrong=2)


@pytest.fixture(scope="module")
def runs(
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[dict[str, tuple[subprocess.Popen[bytes], Path]]]:
    """A process for each case, all started at once: starting one takes seconds."""
    folder = tmp_path_factory.mktemp("out_of_range")
    started = {}
    for number, (name, call) in enumerate(CASES.items()):
        log = folder / f"{number}.log"
        with log.open("wb") as output:
            code = [sys.executable, "-c", BEGIN + call + END]
            started[name] = (subprocess.Popen(code, stdout=output, stderr=subprocess.STDOUT), log)
    yield started
    for process, _ in started.values():
        process.kill()
        process.wait()


@pytest.mark.parametrize("name", CASES)
def test_ends_in_an_assertion(name: str, runs: Runs) -> None:
    process, log = runs[name]
    code = process.wait(180)
    text = log.read_text(errors="replace")
    assert "ready" in text, text
    assert "nothing happened" not in text and code != 0, text
    assert "device-side assert" in text, text
    assert "illegal memory access" not in text, text
