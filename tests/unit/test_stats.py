"""What the agent says of itself: counts, conditions, and a log that no sender can fill."""

from __future__ import annotations

import json
from collections import Counter

import pytest

from socs_monitor.stats import DIGEST_S, MAX_PROBLEMS, Stats
from tests.chain import Clock


class Bench(Stats):
    """Stats with a clock of their own, and what they said."""

    def __init__(self) -> None:
        self.said: list[tuple[str, str]] = []
        self.clock = Clock()
        super().__init__(lambda level, text: self.said.append((level, text)), self.clock)

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
    stats.last_file = "/x"
    counts = {"received": 21, "settled": 1, "settling": 2, "pending": 3, "waiting": 4, "dead": 5, "discarded": 6}
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
            "last": "/x",
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
        stats.warn(f"problem {number}")

    problems = shown(stats)["problems"]
    assert problems[-1] == {"time": stats.clock.now, "text": f"problem {MAX_PROBLEMS + 4}"}
    assert [problem["text"] for problem in problems] == [f"problem {number}" for number in range(5, MAX_PROBLEMS + 5)]
    assert stats.said[0] == ("warn", "problem 0")


def test_what_is_as_it_should_be_is_no_problem(stats: Bench) -> None:
    stats.info("registered 3 files")

    assert stats.said == [("info", "registered 3 files")]
    assert shown(stats)["problems"] == []


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


def test_a_repeated_error_is_a_problem_too(stats: Bench) -> None:
    stats.repeated("error", "given up", "gave up a file")

    assert [problem["text"] for problem in shown(stats)["problems"]] == ["gave up a file"]
