"""A line of the log: for a person first, then logfmt that any reader parses back."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from socs_monitor.health.events import AT_WILL, EVENTS, line

PAIR = re.compile(r' ([a-z0-9_]+)=("(?:[^"\\]|\\.)*"|[^\s"]+)')


def parse(text: str) -> tuple[str, dict[str, str]]:
    """What a reader of logfmt makes of a line: the text before, and the keys."""
    said, _, keys = text.rpartition(" | event=")
    keys = f" event={keys}"
    pairs = PAIR.findall(keys)
    assert "".join(f" {key}={value}" for key, value in pairs) == keys
    return said, {key: json.loads(value) if value.startswith('"') else value for key, value in pairs}


def test_the_text_comes_first_and_then_the_event_and_the_keys() -> None:
    assert line("registered", "registered 4 files", {"files": 4, "path": "/data/a b.npy", "s": 0.1234567891}) == (
        'registered 4 files | event=registered files=4 path="/data/a b.npy" s=0.123457'
    )
    assert line("messages_lost", "lost", {}) == "lost | event=messages_lost"


@pytest.mark.parametrize("value", ["", " ", '"', "=", "\\", "a\nb", "\x00", "\u2028", "é", "a\x1b[31m", "/plain/x.g3"])
def test_any_value_is_one_value_on_one_line(value: str) -> None:
    shown = line("messages_lost", "text", {"path": value, "lost": 1})

    assert len(shown.splitlines()) == 1
    assert shown.isprintable()
    assert parse(shown) == ("text", {"event": "messages_lost", "path": value, "lost": "1"})


@given(st.text())
def test_what_a_sender_writes_makes_no_other_keys(value: str) -> None:
    shown = line("messages_lost", "text", {"id": value, "lost": 1})

    assert parse(shown)[1] == {"event": "messages_lost", "id": value, "lost": "1"}


def test_of_a_long_value_the_middle_is_left_out() -> None:
    _, keys = parse(line("messages_lost", "text", {"id": "a" * 5000 + "b" * 5000}))

    assert len(keys["id"]) < 410
    assert (keys["id"][0], keys["id"][-1]) == ("a", "b")
    assert len(line("internal_error", "text", {"traceback": "x" * 5000})) > 5000


def test_every_event_is_defined_and_used() -> None:
    package = Path(__file__).parents[3] / "socs_monitor"
    source = "".join(path.read_text() for path in package.rglob("*.py") if path.name != "events.py")
    used: set[Any] = {name for name in EVENTS if f'"{name}"' in source}

    assert used == set(EVENTS)
    assert set(EVENTS) >= AT_WILL
    logged = re.findall(r'\.(?:log|repeated|reporter|_report)\(\s*"(?:info|warn|error)",\s*"([a-z_]+)"', source)
    assert len(logged) > 15
    assert set(logged) <= set(EVENTS)
