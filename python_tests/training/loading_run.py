"""A run that loads with a worker until it is stopped: prints its worker's number, and a line for each batch.

python loading_run.py FOLDER
"""

from __future__ import annotations

import multiprocessing
import signal
import sys
import time

from image_data import IMAGE

from evit_ext.training.config import TrainConfig
from evit_ext.training.loaders import Loaders
from evit_ext.training.ranks import ALONE


def main(folder: str) -> None:
    stopped = []
    signal.signal(signal.SIGTERM, lambda *_: stopped.append(True))
    config = TrainConfig(data=folder, batch_size=1, workers=1, epochs=10)
    opened = Loaders(config, ALONE, 1, 1, IMAGE)
    for number, _ in enumerate(opened.train(0)):
        if number == 0:
            print(multiprocessing.active_children()[0].pid, flush=True)
        print("batch", number, "stopped" if stopped else "", flush=True)
        time.sleep(0.3)


if __name__ == "__main__":
    main(sys.argv[1])
