"""What processes tell each other, as JSON: ``python talking_ranks.py [dying]``, in each of them."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from evit_ext.training import ranks


def gloo_threads() -> int:
    names = [(task / "comm").read_text() for task in Path("/proc/self/task").iterdir()]
    return sum("gloo" in name for name in names)


def main(dying: bool) -> None:
    with ranks.join("cpu", timeout=60) as here:
        if dying and here.rank == 1:
            os._exit(9)
        said = {
            "place": [here.rank, here.world_size, here.local_rank, here.is_first, str(here.device)],
            # float32 has no 2**24 + 1, and float64 no integer above 2**53 either.
            "sum": here.sum([here.rank, 2**24 + 1, 0.1]),
            "none": here.sum([]),
            "gather": here.gather({"rank": here.rank, "nothing": None}),
        }
        time.sleep(0.5 * here.rank)
        before = time.time()
        here.barrier()
        said["waited"] = time.time() - before
        model = DistributedDataParallel(nn.Linear(2, 2))
        model(torch.zeros(1, 2)).sum().backward()
        model.itself = model  # a cycle, as real models have
        del model
        said["threads"] = gloo_threads()
    said["threads left"] = gloo_threads()
    try:
        here.barrier()
    except RuntimeError as error:
        said["barrier"] = str(error)
    print(json.dumps(said))


if __name__ == "__main__":
    main(sys.argv[1:] == ["dying"])
