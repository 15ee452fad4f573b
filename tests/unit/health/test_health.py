"""The agent's health: counters, conditions, and a log that no sender can fill."""

from __future__ import annotations

import json
from collections import Counter

import pytest

from socs_monitor.health.events import AT_WILL
from socs_monitor.health.health import Health
from socs_monitor.health.log import MAX_PROBLEMS, THROTTLE_S
from tests.chain import Clock


class Bench(Health):
    """Health with a clock of their own, and what they said: levels and texts, and beside them the whole lines."""

    def __init__(self) -> None:
        self.said: list[tuple[str, str]] = []
        self.lines: list[str] = []
        self.clock = Clock()
        super().__init__(self._hear, self.clock, self.clock.monotonic)

    def _hear(self, level: str, line: str) -> None:
        self.said.append((level, line.partition(" | ")[0]))
        self.lines.append(line)

    def texts(self) -> list[str]:
        """What was said since the last call."""
        texts = [text for _, text in self.said]
        self.said.clear()
        return texts


@pytest.fixture
def health() -> Bench:
    return Bench()


def shown(health: Health, **counts: int) -> dict[str, object]:
    return health.data(Counter(counts))


def test_the_session_data_is_json_with_the_documented_keys(health: Bench) -> None:
    health.counters.datagrams.update(metadata=3, data_file=2)
    health.counters.bytes += 500
    health.counters.malformed["not JSON"] += 1
    health.counters.refused["spool"] += 4
    health.counters.unpublished["overload"] += 5
    health.count_registered(2, ["crate1slot2", "STREAMER:s2"], "/x")
    health.counters.writes.wrote(0.5)
    health.counters.streams.metadata("s2")
    counts = {"received": 21, "settled": 1, "registered": 2, "pending": 3, "waiting": 4, "dead": 5, "discarded": 6}
    data = json.loads(json.dumps(shown(health, **counts)))

    assert data == {
        "timestamp": health.clock.now,
        "degraded": {},
        "datagrams": {"total": 5, "bytes": 500, "by_type": {"metadata": 3, "data_file": 2}},
        "malformed": {"not JSON": 1},
        "refused": {"spool": 4},
        "unpublished": {"overload": 5},
        "files": {
            **{"received": 21, "registered": 3, "pending": 3, "waiting": 4, "dead": 5, "discarded": 6, "settling": 2},
            **{"last": "/x", "last_time": health.clock.now},
        },
        "database": {"write": 0.5, "write_max": 0.5, "errors": 0, "corrected": 0, "row_without_file": 0},
        "streams": {
            "crate1slot2": {"files_today": 1, "last_file": health.clock.now, "last_metadata": None},
            "s2": {"files_today": 1, "last_file": health.clock.now, "last_metadata": health.clock.now},
        },
        "problems": [],
    }
    files = data["files"]
    assert files["received"] == sum(files[key] for key in ("registered", "pending", "waiting", "dead", "discarded"))


def test_returned_session_data_does_not_change_afterwards(health: Bench) -> None:
    before = shown(health)
    copy = json.dumps(before)
    health.counters.datagrams["metadata"] += 1
    health.count_malformed("empty", "h")
    health.conditions.set_condition("database", "locked")

    assert json.dumps(before) == copy


def test_a_condition_is_logged_when_it_begins_and_when_it_ends(health: Bench) -> None:
    assert not health.conditions
    for number in range(3):
        health.conditions.set_condition("database", f"locked {number}")
    assert health.conditions
    assert shown(health)["degraded"] == {"database": "locked 2"}
    for _ in range(3):
        health.conditions.clear_condition("database", "works again")

    assert not health.conditions
    assert health.said == [("error", "locked 0"), ("info", "works again")]
    assert health.lines == [
        "locked 0 | event=degraded condition=database",
        "works again | event=recovered condition=database",
    ]


def test_a_timed_condition_ends_by_itself_and_can_be_prolonged(health: Bench) -> None:
    health.conditions.set_condition_for("messages_lost", "lost 1", 300)
    health.clock.advance(200)
    health.conditions.set_condition_for("messages_lost", "lost 2", 300)
    health.clock.advance(299)
    health.tick()
    assert shown(health)["degraded"] == {"messages_lost": "lost 2"}
    assert health.said == []
    health.clock.advance(1)
    health.tick()

    assert not health.conditions
    assert [level for level, _ in health.said] == ["info"]


def test_forgetting_a_condition_logs_nothing(health: Bench) -> None:
    health.conditions.set_condition("database", "locked")
    health.said.clear()
    health.conditions.forget("database", "spool_update")

    assert (bool(health.conditions), health.said) == (False, [])
    health.conditions.set_condition("database", "still locked")
    assert health.said == [("error", "still locked")]


def test_conditions_are_independent(health: Bench) -> None:
    health.conditions.set_condition("database", "locked")
    health.conditions.set_condition("spool", "full")
    health.conditions.clear_condition("database", "works again")

    assert health.conditions
    assert shown(health)["degraded"] == {"spool": "full"}


def test_the_last_problems_are_kept(health: Bench) -> None:
    for number in range(MAX_PROBLEMS + 5):
        health.clock.advance(1)
        health.log.log("warn", "spool", f"problem {number}")

    problems = shown(health)["problems"]
    assert problems[-1] == {"time": health.clock.now, "text": f"problem {MAX_PROBLEMS + 4}"}
    assert [problem["text"] for problem in problems] == [f"problem {number}" for number in range(5, MAX_PROBLEMS + 5)]
    assert health.said[0] == ("warn", "problem 0")


def test_info_lines_are_not_problems(health: Bench) -> None:
    health.count_registered(3, [], "/data/a file")

    assert health.said == [("info", "Registered 3 files")]
    assert health.lines == ['Registered 3 files | event=registered count=3 path="/data/a file"']
    assert shown(health)["problems"] == []


def test_registered_files_share_one_line_per_second(health: Bench) -> None:
    for number in range(20):
        health.count_registered(40, [], f"/data/{number}")
        health.clock.advance(0.125)
    assert health.lines == [
        "Registered 40 files | event=registered count=40 path=/data/0",
        "Registered 320 files | event=registered count=320 path=/data/8",
        "Registered 320 files | event=registered count=320 path=/data/16",
    ]

    health.clock.advance(1)
    for _ in range(2):
        health.tick()
    assert health.said[3:] == [("info", "Registered 120 files")]


def test_malformed_datagrams_share_one_line_per_minute_with_reasons_and_senders(health: Bench) -> None:
    for number in range(1000):
        health.count_malformed("not JSON" if number % 3 else "empty", f"10.0.0.{number % 2}")
    assert len(health.texts()) == 1, "the first is told at once"
    health.clock.advance(THROTTLE_S - 1)
    health.tick()
    assert health.texts() == []
    health.clock.advance(1)
    health.tick()
    (text,) = health.texts()

    assert text == "Dropped 999 datagrams (not JSON: 666, 10.0.0.1: 500, 10.0.0.0: 499, empty: 333)"
    assert health.counters.malformed == {"not JSON": 666, "empty": 334}
    health.clock.advance(THROTTLE_S)
    health.tick()
    assert health.texts() == [], "there were none in this minute"


def test_any_number_of_senders_takes_little_memory_and_a_short_line(health: Bench) -> None:
    for number in range(20_000):
        health.count_malformed("empty", f"sender {number}")
    health.clock.advance(THROTTLE_S)
    health.tick()

    assert all(len(text) < 300 for text in health.texts())
    health.count_malformed("empty", "a sender")
    for number in range(20_000):
        health.count_malformed("empty", f"sender {number}")
    assert len(health.log._throttles["dropped"].labels) <= 1000


def test_repeated_lines_are_written_once_per_minute_with_a_count(health: Bench) -> None:
    for number in range(10):
        health.log.log_throttled("warn", "refused", f"refused {number}")
        health.log.log_throttled("info", "waiting", f"waiting {number}")
    assert health.said == [("warn", "refused 0"), ("info", "waiting 0")]
    health.said.clear()
    health.clock.advance(THROTTLE_S)
    health.tick()

    expected = [f"9 more like this in the last 60 s, the latest: {kind} 9" for kind in ("refused", "waiting")]
    assert health.said == [("warn", expected[0]), ("info", expected[1])]
    health.said.clear()
    health.log.log_throttled("warn", "refused", "refused again")
    assert health.said == [], "a line was said just now"
    health.clock.advance(THROTTLE_S)
    health.tick()
    assert health.texts() == ["1 more like this in the last 60 s, the latest: refused again"]


def test_rare_lines_are_written_at_once(health: Bench) -> None:
    for number in range(3):
        health.log.log_throttled("warn", "refused", f"refused {number}")
        health.clock.advance(THROTTLE_S)
        health.tick()

    assert health.texts() == ["refused 0", "refused 1", "refused 2"]


@pytest.mark.parametrize("event", sorted(AT_WILL))
def test_events_that_senders_cause_at_will_are_not_problems(health: Bench, event: str) -> None:
    health.log.log("warn", event, "somebody sent something")

    assert health.texts() == ["somebody sent something"]
    assert shown(health)["problems"] == []


def test_a_repeated_error_is_a_problem_too(health: Bench) -> None:
    health.log.log_throttled("error", "file_missing", "gave up a file")

    assert [problem["text"] for problem in shown(health)["problems"]] == ["gave up a file"]


@pytest.mark.parametrize(
    "text",
    ["x" * 64_000, "é\n" * 20_000, "\U0001f600" * 30_000, '"' * 60_000],
    ids=["ASCII", "controls", "wide", "quotes"],
)
def test_the_session_data_is_bounded_whatever_senders_write(health: Bench, text: str) -> None:
    for number in range(100):
        health.log.log("error", "file_missing", f"{number}{text}")
        health.count_registered(1, [f"{number}{text}", f"{text}{number}"], text)
        health.counters.streams.metadata(f"STREAMER:{number}{text}")
    for condition in ("database", "spool", "messages_lost", "file_missing"):
        health.conditions.set_condition(condition, text)

    assert len(json.dumps(shown(health))) < 70_000
    assert all(len(line) < 3000 for line in health.lines if "event=registered" in line)
