"""Text from senders is shown on one printable line of bounded length."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from socs_monitor.wire.text import plural, sanitize, shorten


@given(st.text() | st.integers(), st.integers(20, 400))
def test_any_text_becomes_one_printable_line_of_bounded_length(text: object, max_chars: int) -> None:
    shown = sanitize(text, max_chars)

    assert shown.isprintable()
    assert len(shown) <= max_chars


@pytest.mark.parametrize(
    ("text", "shown"),
    [("/a b/\u00e9", "/a b/\u00e9"), ("a\nb\x1b[31m", "a\\nb\\x1b[31m"), (7, "7"), ("\ud800", "\\ud800")],
)
def test_only_control_characters_are_escaped(text: object, shown: str) -> None:
    assert sanitize(text) == sanitize(text, None) == shown


def test_the_middle_of_a_long_text_is_cut_out() -> None:
    assert shorten("a" * 10, 10) == "a" * 10
    assert shorten("a" * 50 + "b" * 50, 20) == "aaaaa ... bbbbbbbbbb"
    assert len(sanitize("\n" * 1000, None)) == 2000


def test_counts_have_the_right_plural() -> None:
    assert [plural(count, "file") for count in (0, 1, 2)] == ["0 files", "1 file", "2 files"]
