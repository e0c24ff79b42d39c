"""The fixture of the lines."""

from __future__ import annotations

import pytest
from family_lines import LINES, Line


@pytest.fixture(params=LINES, ids=[line.name for line in LINES])
def line(request: pytest.FixtureRequest) -> Line:
    """Each line of the table in turn."""
    return request.param  # type: ignore[no-any-return]
