"""Models side by side: inference and training steps, timed in turns."""

from evit_ext._util.choices import MODES, TASKS
from evit_ext._util.memory import memory_added
from evit_ext._util.timing import Here, time_in_turns
from evit_ext.benchmark.apart import Apart, apart
from evit_ext.benchmark.contestants import Contestant, contestants
from evit_ext.benchmark.engines import engine_files, measure_engines
from evit_ext.benchmark.measure import Row, measure

__all__ = [
    "MODES",
    "TASKS",
    "Apart",
    "Contestant",
    "Here",
    "Row",
    "apart",
    "contestants",
    "engine_files",
    "measure",
    "measure_engines",
    "memory_added",
    "time_in_turns",
]
