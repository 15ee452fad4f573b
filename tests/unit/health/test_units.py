"""Quantities as text."""

from __future__ import annotations

import pytest

from socs_monitor.health.units import span


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.4, "400 ms"),
        (1, "1 s"),
        (60, "1 min"),
        (61, "61 s"),
        (119, "119 s"),
        (120, "2 min"),
        (3600, "1 h"),
        (5400, "90 min"),
        (86400, "1 d"),
        (90000, "25 h"),
        (172_800, "2 d"),
    ],
)
def test_span_is_written_in_a_suitable_unit(seconds: float, text: str) -> None:
    assert span(seconds) == text
