"""What processes tell each other, as JSON: ``python talking_ranks.py [dying]``, in each of them."""

from __future__ import annotations

import json
import os
import sys
import time

from evit_ext.training import ranks


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
        print(json.dumps(said))


if __name__ == "__main__":
    main(sys.argv[1:] == ["dying"])
