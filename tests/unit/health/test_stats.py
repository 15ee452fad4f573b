"""What the agent says of itself: counts, conditions, and a log that no sender can fill."""

from __future__ import annotations

import json
from collections import Counter

import pytest

from socs_monitor.health.events import AT_WILL
from socs_monitor.health.stats import DIGEST_S, MAX_PROBLEMS, Stats
from tests.chain import Clock


class Bench(Stats):
    """Stats with a clock of their own, and what they said: levels and texts, and beside them the whole lines."""

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
def stats() -> Bench:
    return Bench()


def shown(stats: Stats, **counts: int) -> dict[str, object]:
    return stats.data(Counter(counts))


def test_the_session_data_is_json_with_the_documented_keys(stats: Bench) -> None:
    stats.datagrams.update(metadata=3, data_file=2)
    stats.bytes += 500
    stats.malformed["not JSON"] += 1
    stats.refused["spool"] += 4
    stats.unpublished["overload"] += 5
    stats.registered(2, ["crate1slot2", "STREAMER:s2"], "/x")
    stats.writes.wrote(0.5)
    stats.streams.metadata("s2")
    counts = {"received": 21, "settled": 1, "registered": 2, "pending": 3, "waiting": 4, "dead": 5, "discarded": 6}
    data = json.loads(json.dumps(shown(stats, **counts)))

    assert data == {
        "timestamp": stats.clock.now,
        "degraded": {},
        "datagrams": {"total": 5, "bytes": 500, "by_type": {"metadata": 3, "data_file": 2}},
        "malformed": {"not JSON": 1},
        "refused": {"spool": 4},
        "unpublished": {"overload": 5},
        "files": {
            **{"received": 21, "registered": 3, "pending": 3, "waiting": 4, "dead": 5, "discarded": 6, "settling": 2},
            **{"last": "/x", "last_time": stats.clock.now},
        },
        "database": {"write": 0.5, "write_max": 0.5, "errors": 0, "corrected": 0, "row_without_file": 0},
        "streams": {
            "crate1slot2": {"files_today": 1, "last_file": stats.clock.now, "last_metadata": None},
            "s2": {"files_today": 1, "last_file": stats.clock.now, "last_metadata": stats.clock.now},
        },
        "problems": [],
    }
    files = data["files"]
    assert files["received"] == sum(files[key] for key in ("registered", "pending", "waiting", "dead", "discarded"))


def test_what_was_shown_does_not_change_afterwards(stats: Bench) -> None:
    before = shown(stats)
    copy = json.dumps(before)
    stats.datagrams["metadata"] += 1
    stats.useless("empty", "h")
    stats.trouble("database", "locked")

    assert json.dumps(before) == copy


def test_a_condition_is_logged_when_it_begins_and_when_it_ends(stats: Bench) -> None:
    assert not stats.degraded
    for number in range(3):
        stats.trouble("database", f"locked {number}")
    assert stats.degraded
    assert shown(stats)["degraded"] == {"database": "locked 2"}
    for _ in range(3):
        stats.cured("database", "works again")

    assert not stats.degraded
    assert stats.said == [("error", "locked 0"), ("info", "works again")]
    assert stats.lines == [
        "locked 0 | event=degraded condition=database",
        "works again | event=recovered condition=database",
    ]


def test_an_alarm_ends_by_itself_and_is_renewed_by_the_next(stats: Bench) -> None:
    stats.alarm("messages_lost", "lost 1", 300)
    stats.clock.advance(200)
    stats.alarm("messages_lost", "lost 2", 300)
    stats.clock.advance(299)
    stats.digest()
    assert shown(stats)["degraded"] == {"messages_lost": "lost 2"}
    assert stats.said == []
    stats.clock.advance(1)
    stats.digest()

    assert not stats.degraded
    assert [level for level, _ in stats.said] == ["info"]


def test_what_is_forgotten_is_neither_degraded_nor_recovered(stats: Bench) -> None:
    stats.trouble("database", "locked")
    stats.said.clear()
    stats.forget("database", "spool_update")

    assert (stats.degraded, stats.said) == (False, [])
    stats.trouble("database", "still locked")
    assert stats.said == [("error", "still locked")]


def test_conditions_are_told_apart(stats: Bench) -> None:
    stats.trouble("database", "locked")
    stats.trouble("spool", "full")
    stats.cured("database", "works again")

    assert stats.degraded
    assert shown(stats)["degraded"] == {"spool": "full"}


def test_what_holds_no_longer_is_not_cured_again(stats: Bench) -> None:
    stats.cured("database", "works again")

    assert stats.said == []


def test_the_last_problems_are_kept(stats: Bench) -> None:
    for number in range(MAX_PROBLEMS + 5):
        stats.clock.advance(1)
        stats.log("warn", "spool", f"problem {number}")

    problems = shown(stats)["problems"]
    assert problems[-1] == {"time": stats.clock.now, "text": f"problem {MAX_PROBLEMS + 4}"}
    assert [problem["text"] for problem in problems] == [f"problem {number}" for number in range(5, MAX_PROBLEMS + 5)]
    assert stats.said[0] == ("warn", "problem 0")


def test_what_is_as_it_should_be_is_no_problem(stats: Bench) -> None:
    stats.registered(3, [], "/data/a file")

    assert stats.said == [("info", "registered 3 files")]
    assert stats.lines == ['registered 3 files | event=registered files=3 path="/data/a file"']
    assert shown(stats)["problems"] == []


def test_files_that_follow_each_other_fast_share_a_line_a_second(stats: Bench) -> None:
    for number in range(20):
        stats.registered(40, [], f"/data/{number}")
        stats.clock.advance(0.125)
    assert stats.lines == [
        "registered 40 files | event=registered files=40 path=/data/0",
        "registered 320 files | event=registered files=320 path=/data/8",
        "registered 320 files | event=registered files=320 path=/data/16",
    ]

    for _ in range(2):
        stats.digest()
    assert stats.said[3:] == [("info", "registered 120 files")]


def test_useless_datagrams_are_one_line_a_minute_with_reasons_and_senders(stats: Bench) -> None:
    for number in range(1000):
        stats.useless("not JSON" if number % 3 else "empty", f"10.0.0.{number % 2}")
    assert len(stats.texts()) == 1, "the first is told at once"
    stats.clock.advance(DIGEST_S - 1)
    stats.digest()
    assert stats.texts() == []
    stats.clock.advance(1)
    stats.digest()
    (text,) = stats.texts()

    assert text.startswith("999 datagrams were dropped (not JSON: 666, empty: 333)")
    assert "10.0.0.1: 500" in text
    assert "10.0.0.0: 499" in text
    assert stats.malformed == {"not JSON": 666, "empty": 334}
    stats.clock.advance(DIGEST_S)
    stats.digest()
    assert stats.texts() == [], "there were none in this minute"


def test_any_number_of_senders_takes_little_memory_and_a_short_line(stats: Bench) -> None:
    for number in range(20_000):
        stats.useless("empty", f"sender {number}")
    stats.clock.advance(DIGEST_S)
    stats.digest()

    assert len(stats._useless_senders) == 0
    assert all(len(text) < 300 for text in stats.texts())
    stats.useless("empty", "a sender")
    for number in range(20_000):
        stats.useless("empty", f"sender {number}")
    assert len(stats._useless_senders) <= 1000


def test_of_lines_that_repeat_one_a_minute_is_said_and_the_others_are_counted(stats: Bench) -> None:
    for number in range(10):
        stats.repeated("warn", "refused", f"refused {number}")
        stats.repeated("info", "waiting", f"waiting {number}")
    assert stats.said == [("warn", "refused 0"), ("info", "waiting 0")]
    stats.said.clear()
    stats.clock.advance(DIGEST_S)
    stats.digest()

    expected = [f"9 more like this in the last minute, the latest: {kind} 9" for kind in ("refused", "waiting")]
    assert stats.said == [("warn", expected[0]), ("info", expected[1])]
    stats.said.clear()
    stats.repeated("warn", "refused", "refused again")
    assert stats.said == [], "a line was said just now"
    stats.clock.advance(DIGEST_S)
    stats.digest()
    assert stats.texts() == ["1 more like this in the last minute, the latest: refused again"]


def test_lines_that_are_rare_are_said_at_once(stats: Bench) -> None:
    for number in range(3):
        stats.repeated("warn", "refused", f"refused {number}")
        stats.clock.advance(DIGEST_S)
        stats.digest()

    assert stats.texts() == ["refused 0", "refused 1", "refused 2"]


@pytest.mark.parametrize("event", sorted(AT_WILL))
def test_what_senders_can_bring_about_at_will_does_not_push_out_the_problems(stats: Bench, event: str) -> None:
    stats.log("warn", event, "somebody sent something")

    assert stats.texts() == ["somebody sent something"]
    assert shown(stats)["problems"] == []


def test_a_repeated_error_is_a_problem_too(stats: Bench) -> None:
    stats.repeated("error", "file_missing", "gave up a file")

    assert [problem["text"] for problem in shown(stats)["problems"]] == ["gave up a file"]


@pytest.mark.parametrize(
    "text",
    ["x" * 64_000, "é\n" * 20_000, "\U0001f600" * 30_000, '"' * 60_000],
    ids=["ASCII", "controls", "wide", "quotes"],
)
def test_the_session_data_stays_small_whatever_senders_write(stats: Bench, text: str) -> None:
    for number in range(100):
        stats.log("error", "file_missing", f"{number}{text}")
        stats.registered(1, [f"{number}{text}", f"{text}{number}"], text)
        stats.streams.metadata(f"STREAMER:{number}{text}")
    for condition in ("database", "spool", "messages_lost", "file_missing"):
        stats.trouble(condition, text)

    assert len(json.dumps(shown(stats))) < 70_000
    assert all(len(line) < 3000 for line in stats.lines if "event=registered" in line)
