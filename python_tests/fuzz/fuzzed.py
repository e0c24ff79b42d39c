"""How long hypothesis looks: seconds with the ordinary tests, a long time under scripts/fuzz."""

import os

from hypothesis import HealthCheck, settings

_LONG = bool(os.environ.get("EVIT_FUZZ"))

#: For a test that draws what a stranger may have written.
fuzzed = settings(
    max_examples=400 if _LONG else 15,
    derandomize=not _LONG,
    database=None if not _LONG else settings.default.database,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
