"""Files of safetensors: the same bytes for the same contents."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch
from safetensors import safe_open

from evit_ext._util.safetensors_bytes import to_bytes

FACTS = {name: name * 3 for name in "abcdefgh"}


def test_the_same_bytes_in_every_process(tmp_path: Path) -> None:
    tensors = {"b": torch.arange(5.0), "a": torch.ones(2, 3, dtype=torch.bfloat16), "c": torch.zeros(0)}
    content = to_bytes(tensors, FACTS)
    assert content == to_bytes(dict(reversed(tensors.items())), dict(reversed(FACTS.items())))
    (tmp_path / "a.safetensors").write_bytes(content)
    with safe_open(str(tmp_path / "a.safetensors"), "pt") as file:
        assert file.metadata() == FACTS and sorted(file.keys()) == ["a", "b", "c"]
        assert torch.equal(file.get_tensor("b"), tensors["b"])
    program = (
        "import hashlib, torch; from evit_ext._util.safetensors_bytes import to_bytes\n"
        "print(hashlib.sha256(to_bytes({'a': torch.ones(2)}, {n: n * 3 for n in 'abcdefgh'})).hexdigest())"
    )
    once, again = (subprocess.check_output([sys.executable, "-c", program]) for _ in range(2))
    assert once == again
