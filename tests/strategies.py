"""Hypothesis strategies that several tests share."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

# Parts of names that could lead out of the archive, among harmless and odd ones.
NASTY = ("..", ".", "/", "\\", "~", "\0", "\n", " ", "", "a", "é", "iv", "tune", "etc", "x" * 200, "-", "*", "$(id)")


def nasty_text() -> st.SearchStrategy[str]:
    """Draw text from parts that could do harm in a path, or any text."""
    return st.lists(st.sampled_from(NASTY), max_size=6).map("".join) | st.text(max_size=20)


def json_values() -> st.SearchStrategy[Any]:
    """Draw any JSON value, including Python's NaN and infinities."""
    scalars = st.none() | st.booleans() | st.integers() | st.floats() | nasty_text()
    return st.recursive(
        scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    )
