"""Messages that were lost on their way, told by the gaps in their senders' sequence numbers.

A sequence is all that comes from one source address and port with one publisher id and script: its ``seq_no`` counts
from 0. Pure. Senders are not trusted: what is remembered is bounded, whatever they send.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from socs_monitor.wire.messages import brief

# Seconds for which a missing message may still come before it is a loss: datagrams can overtake each other.
GRACE_S = 1.0

# A larger jump is not a loss but another sequence: a real sender needs minutes for so many messages, and anybody can
# forge one datagram.
MAX_JUMP = 10_000

# A sender that starts anew is told by the time in its messages. Where they have none, by a number this far back.
REPEAT_WINDOW = 1000

# Bounds on what is remembered: senders, ranges of missing numbers of each, senders that are shown, and the length of
# their names (characters).
MAX_SENDERS = 1000
MAX_RANGES = 64
MAX_SHOWN = 10
_MAX_NAME = 100

_NUMBER_MAX = 2**63

Key = tuple[tuple[str, int], str, str]


class Loss(NamedTuple):
    """Messages of one sender that did not arrive.

    Attributes:
        sender: Source address, ``host:port``.
        id: Publisher id.
        script: Script id.
        lost: How many.
        time: When the gap was seen, unix time.
    """

    sender: str
    id: str
    script: str
    lost: int
    time: float


class _Range:
    """Missing numbers `first` to `last`, since `since` (CLOCK_MONOTONIC); `counted` once they are a loss."""

    __slots__ = ("counted", "first", "last", "since")

    def __init__(self, first: int, last: int, since: float, counted: bool = False) -> None:
        self.first = first
        self.last = last
        self.since = since
        self.counted = counted

    def __len__(self) -> int:
        return self.last - self.first + 1


class _Sender:
    __slots__ = ("forgotten", "key", "last_loss", "lost", "missing", "next", "time")

    def __init__(self, key: Key) -> None:
        self.key = key
        self.next: int | None = None  # the number that comes if nothing is lost; None before the first message
        self.time: float | None = None  # when the message before that was sent, by its sender's clock
        self.missing: list[_Range] = []
        self.forgotten = 0  # missing, and not to be waited for any more
        self.lost = 0
        self.last_loss = 0.0

    def forget(self, ranges: list[_Range]) -> None:
        self.forgotten += sum(len(missing) for missing in ranges if not missing.counted)

    def loss(self, lost: int) -> Loss:
        (host, port), id_, script = self.key
        return Loss(f"{host}:{port}", brief(id_, _MAX_NAME), brief(script, _MAX_NAME), lost, self.last_loss)


class Sequences:
    """The accounts of all senders. `seen` and `settle` are for one thread, the figures for any.

    Args:
        clock: Gives unix time.
        monotonic: Gives seconds of CLOCK_MONOTONIC.

    Attributes:
        lost (int): Number of messages that did not arrive.
        reordered (int): Number of messages that arrived after one that was sent later.
    """

    def __init__(self, clock: Callable[[], float] = time.time, monotonic: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._monotonic = monotonic
        # Two generations: who is not heard of while MAX_SENDERS / 2 others are is forgotten. So a message in order
        # costs no more than a look-up.
        self._senders: dict[Key, _Sender] = {}
        self._former: dict[Key, _Sender] = {}
        self._unsettled: dict[Key, _Sender] = {}
        self._losers: dict[Key, _Sender] = {}
        self.lost = 0
        self.reordered = 0

    def seen(self, addr: tuple[str, int], envelope: Mapping[str, Any]) -> None:
        """Account for a message from `addr`; one without a sequence number is not counted."""
        number = envelope.get("seq_no")
        if type(number) is not int:
            return
        sent = envelope.get("time")
        if type(sent) is not float:  # nothing else is remembered: it could be of any size
            sent = None
        key: Any = (addr, envelope.get("id"), envelope.get("script", ""))
        try:
            sender = self._senders.get(key)
        except TypeError:  # a script that is a list, say
            return
        if sender is not None and number == sender.next:
            sender.next = number + 1
            sender.time = sent
        elif abs(number) < _NUMBER_MAX:
            sender = sender or self._remember(key)
            if sender is not None:
                # a sender tells with this message that it dropped its last one itself, since that was too large
                self._out_of_order(sender, number, sent, excused=envelope.get("type") == "backend_error")

    def _remember(self, key: tuple[Any, ...]) -> _Sender | None:
        sender = self._former.pop(key, None)
        if sender is None:
            _, id_, script = key
            if not isinstance(id_, str) or not isinstance(script, str) or len(id_) + len(script) > 2 * _MAX_NAME:
                return None
            sender = _Sender(key)
        if len(self._senders) >= MAX_SENDERS // 2:
            self._former = self._senders
            self._senders = {}
        self._senders[sender.key] = sender
        return sender

    def _out_of_order(self, sender: _Sender, number: int, sent: float | None, *, excused: bool) -> None:
        ahead = 0 if sender.next is None else number - sender.next
        if 0 <= ahead <= MAX_JUMP:
            if ahead > excused:
                self._miss(sender, _Range(number - ahead, number - 1 - excused, self._monotonic()))
        elif -MAX_JUMP <= ahead < 0 and not _starts_anew(sender, number, -ahead, sent):
            self._late(sender, number)
            return
        else:
            sender.forget(sender.missing)
            sender.missing = []
        sender.next = number + 1
        sender.time = sent

    def _miss(self, sender: _Sender, missing: _Range) -> None:
        if len(self._unsettled) < MAX_SENDERS or sender.key in self._unsettled:
            self._unsettled[sender.key] = sender
            sender.missing.append(missing)
            if len(sender.missing) > MAX_RANGES:
                sender.forget([sender.missing.pop(0)])

    def _late(self, sender: _Sender, number: int) -> None:
        """Take back what was missing; what was not is a repeated message."""
        for place, missing in enumerate(sender.missing):
            if missing.first <= number <= missing.last:
                parts = (
                    _Range(missing.first, number - 1, missing.since, missing.counted),
                    _Range(number + 1, missing.last, missing.since, missing.counted),
                )
                sender.missing[place : place + 1] = [part for part in parts if len(part)]
                self.reordered += 1
                if missing.counted:
                    self.lost -= 1
                    sender.lost -= 1
                return

    def settle(self) -> list[Loss]:
        """Count what has been missing for long enough; return what was lost, by sender. To be called each second."""
        now, wall = self._monotonic(), self._clock()
        losses = []
        for sender in list(self._unsettled.values()):
            lost, sender.forgotten = sender.forgotten, 0
            waits = False
            for missing in sender.missing:
                if not missing.counted and now - missing.since >= GRACE_S:
                    missing.counted = True
                    sender.last_loss = wall - (now - missing.since)
                    lost += len(missing)
                waits = waits or not missing.counted
            if not waits:
                del self._unsettled[sender.key]
            if lost:
                sender.last_loss = sender.last_loss or wall
                sender.lost += lost
                self.lost += lost
                losses.append(sender.loss(lost))
                self._losers.pop(sender.key, None)
                self._losers[sender.key] = sender
                if len(self._losers) > MAX_SHOWN:
                    del self._losers[next(iter(self._losers))]
        return losses

    def latest(self) -> list[Loss]:
        """All that those senders lost of which messages were lost last, at most `MAX_SHOWN`, the latest first."""
        return [sender.loss(sender.lost) for sender in reversed(list(self._losers.values())) if sender.lost]


def _starts_anew(sender: _Sender, number: int, behind: int, sent: float | None) -> bool:
    """Whether a number that is behind is of a new sequence: a late or repeated message is an old one."""
    if sent is not None and sender.time is not None:
        return sent > sender.time
    missed = any(missing.first <= number <= missing.last for missing in sender.missing)
    return not missed and behind > REPEAT_WINDOW
