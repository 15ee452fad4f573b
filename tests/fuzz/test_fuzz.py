"""A short run of the fuzz targets. `make fuzz` runs them for ten minutes."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from socs_monitor.wire import messages
from socs_monitor.wire.messages import MessageError
from tests import hostile
from tests.fuzz.target import CORPUS, FOLDER, check_monitor, check_parse, datagrams, registrations

SETTINGS = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])


@settings(SETTINGS, max_examples=1000)
@given(datagrams())
def test_any_bytes_are_one_message_or_one_error(datagram: bytes) -> None:
    check_parse(datagram)


@settings(SETTINGS, max_examples=30)
@given(st.lists(datagrams(), max_size=20))
def test_a_monitor_accepts_any_datagrams(batch: list[bytes]) -> None:
    check_monitor(batch)


def test_a_monitor_accepts_every_known_odd_message() -> None:
    assert check_monitor([datagram for datagram, _ in hostile.damaged()])["received"] == 0
    assert check_monitor(hostile.odd_values(f"{FOLDER}/x.txt"))["registered"] > 10
    assert check_monitor([json.dumps(each).encode() for each in registrations()])["registered"] > 5
    traversals = hostile.traversals(f"{FOLDER}/a/b/z.g3")
    assert check_monitor(traversals)["dead"] == len(traversals)


@pytest.mark.parametrize("path", sorted(CORPUS.iterdir()), ids=lambda path: path.name)
def test_former_failures_do_no_harm(path: Path) -> None:
    check_parse(path.read_bytes())
    check_monitor([path.read_bytes()])


def test_the_strategy_draws_every_kind_of_message_and_damage() -> None:
    kinds: Counter[str] = Counter()

    @settings(SETTINGS, max_examples=1000, database=None, derandomize=True)
    @given(datagrams())
    def draw(datagram: bytes) -> None:
        try:
            kinds[type(messages.parse(datagram)).__name__] += 1
        except MessageError as error:
            kinds[error.reason] += 1

    draw()
    expected = {kind.__name__ for kind in messages.Message.__args__} | {hostile.EMPTY, hostile.NOT_JSON, hostile.WRONG}
    assert {kind for kind in kinds if kinds[kind] > 1} >= expected, kinds
