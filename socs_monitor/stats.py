"""What the agent knows about itself: the counters behind ``session.data`` and the conditions that degrade it."""

from __future__ import annotations

import time
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Mapping
from typing import Any

# Problems kept for `session.data`, newest last.
MAX_PROBLEMS = 20


# Seconds for which datagrams that are no use are gathered into one line of the log.
DIGEST_S = 60.0

# Senders told apart in such a line.
_SENDERS_MAX = 1000


class Stats:
    """Counters, and the conditions under which files do not get through. Safe to update from any thread.

    Args:
        say: Called with ``(level, text)`` for each line that belongs in the log; levels are txaio's.
        clock: Gives unix time.

    Attributes:
        datagrams (Counter): Number of datagrams by message type.
        bytes (int): Their bytes.
        malformed (Counter): Number of datagrams that were no message, by reason.
        refused (Counter): Number of registrations that could not even be taken in, by reason.
        unpublished (Counter): Number of messages that reached no feed, by kind.
        last_file (str): Path of the file that was registered last.
    """

    def __init__(self, say: Callable[[str, str], None], clock: Callable[[], float] = time.time) -> None:
        self._say = say
        self._clock = clock
        self._conditions: dict[str, str] = {}
        self._problems: deque[dict[str, object]] = deque(maxlen=MAX_PROBLEMS)
        self.datagrams: Counter[str] = Counter()
        self.bytes = 0
        self.malformed: Counter[str] = Counter()
        self.refused: Counter[str] = Counter()
        self._useless: Counter[str] = Counter()
        self._useless_senders: Counter[str] = Counter()
        self._said: defaultdict[str, float] = defaultdict(float)
        self._unsaid: dict[str, tuple[int, str, str]] = {}
        self.unpublished: Counter[str] = Counter()
        self.last_file = ""

    @property
    def degraded(self) -> bool:
        """Whether there is a condition under which files do not get through."""
        return bool(self._conditions)

    def trouble(self, condition: str, reason: str) -> None:
        """Note that `condition` holds, with its `reason` for a person; logged when it begins, not while it lasts."""
        if condition not in self._conditions:
            self.problem("error", reason)
        self._conditions[condition] = reason

    def cured(self, condition: str, text: str) -> None:
        """Note that `condition` no longer holds; `text` is logged if it did."""
        if self._conditions.pop(condition, None) is not None:
            self._say("info", text)

    def useless(self, reason: str, sender: str) -> None:
        """Count a datagram of host `sender` that is no message; the log gets one line a minute about them."""
        self.malformed[reason] += 1
        self._useless[reason] += 1
        if sender in self._useless_senders or len(self._useless_senders) < _SENDERS_MAX:
            self._useless_senders[sender] += 1
        if self._clock() - self._said["useless"] >= DIGEST_S:
            self._say_useless()

    def _say_useless(self) -> None:
        reasons = ", ".join(f"{reason}: {count}" for reason, count in self._useless.most_common())
        senders = ", ".join(f"{sender}: {count}" for sender, count in self._useless_senders.most_common(5))
        self._say("warn", f"{self._useless.total()} datagrams were dropped ({reasons}); most came from {senders}")
        self._useless.clear()
        self._useless_senders.clear()
        self._said["useless"] = self._clock()

    def repeated(self, level: str, kind: str, text: str) -> None:
        """Log a line of which there may be many; of each `kind` one a minute is written, the others are counted."""
        if self._clock() - self._said[kind] < DIGEST_S:
            count, _, _ = self._unsaid.get(kind, (0, "", ""))
            self._unsaid[kind] = (count + 1, level, text)
        else:
            self._said[kind] = self._clock()
            (self.problem if level == "error" else self._say)(level, text)

    def digest(self) -> None:
        """Log what was held back and is due; to be called now and then."""
        now = self._clock()
        if self._useless and now - self._said["useless"] >= DIGEST_S:
            self._say_useless()
        for kind in [kind for kind in self._unsaid if now - self._said[kind] >= DIGEST_S]:
            count, level, text = self._unsaid.pop(kind)
            self._said[kind] = now
            self._say(level, f"{count} more like this in the last minute, the latest: {text}")

    def problem(self, level: str, text: str) -> None:
        """Log a line and keep it among the last problems."""
        self._problems.append({"time": self._clock(), "text": text})
        self._say(level, text)

    def warn(self, text: str) -> None:
        """Log a warning and keep it among the last problems."""
        self.problem("warn", text)

    def info(self, text: str) -> None:
        """Log a line about something that is as it should be."""
        self._say("info", text)

    def data(self, counts: Mapping[str, int]) -> dict[str, Any]:
        """Build ``session.data``; `counts` are the spool's, of one moment."""
        settling = counts["settling"]
        return {
            "timestamp": self._clock(),
            "degraded": dict(self._conditions),
            "datagrams": {"total": self.datagrams.total(), "bytes": self.bytes, "by_type": dict(self.datagrams)},
            "malformed": dict(self.malformed),
            "refused": dict(self.refused),
            "unpublished": dict(self.unpublished),
            "files": {
                "received": counts["received"],
                "registered": counts["settled"] + settling,
                "pending": counts["pending"],
                "waiting": counts["waiting"],
                "dead": counts["dead"],
                "discarded": counts["discarded"],
                "settling": settling,
                "last": self.last_file,
            },
            "problems": list(self._problems),
        }
