"""Files of safetensors that are equal where their contents are."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping

from safetensors.torch import save
from torch import Tensor


def to_bytes(tensors: Mapping[str, Tensor], facts: Mapping[str, str]) -> bytes:
    """Return a safetensors file: the same bytes for the same tensors and facts, in any order.

    The library itself writes the facts (its metadata) in an order that changes from process to process, so
    that checksums of equal files differ.

    Args:
        tensors: contiguous, on the CPU.
        facts: texts by name.
    """
    content = save(dict(tensors), dict(facts))
    (length,) = struct.unpack("<Q", content[:8])
    header = json.dumps(json.loads(content[8 : 8 + length]), sort_keys=True, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)  # the tensors begin at a multiple of 8 bytes
    return struct.pack("<Q", len(header)) + header + content[8 + length :]
