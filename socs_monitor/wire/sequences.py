"""Counts messages lost on the way, by the gaps in their senders' sequence numbers.

A sequence is everything that one address and port sends with one publisher id and script; its ``seq_no`` counts from 0.
Pure. Whatever senders write, the memory used is bounded.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeAlias

from socs_monitor.wire.text import sanitize

# Seconds for which a missing message may still arrive before it counts as lost: datagrams can overtake each other.
GRACE_S = 1.0

# A larger jump starts another sequence and is not a loss. A real sender needs minutes for as many messages, but anybody
# can forge one datagram.
MAX_JUMP = 10_000

# A restarted sender is recognised by the time in its messages. Without times, by a number this far behind.
REPEAT_WINDOW = 1000

# Bounds on memory: senders, ranges of missing numbers per sender, senders in the session data, and characters of their
# names.
MAX_SENDERS = 1000
MAX_RANGES = 64
MAX_SHOWN = 10
_MAX_NAME = 100

_NUMBER_MAX = 2**63

Key: TypeAlias = tuple[tuple[str, int], str, str]  # address and port, publisher id, script


class Loss(NamedTuple):
    """Messages of one sender that did not arrive.

    Attributes:
        sender: Source address, ``host:port``.
        id: Publisher id.
        script: Script id.
        lost: Number of messages.
        last: When the latest of them was noticed to be missing, in unix time.
    """

    sender: str
    id: str
    script: str
    lost: int
    last: float


class _Range:
    """The missing numbers `first` to `last`, since `since` (CLOCK_MONOTONIC); `is_lost` once the grace is over."""

    __slots__ = ("first", "is_lost", "last", "since")

    def __init__(self, first: int, last: int, since: float, is_lost: bool = False) -> None:
        self.first = first
        self.last = last
        self.since = since
        self.is_lost = is_lost

    def __len__(self) -> int:
        return self.last - self.first + 1

    def without(self, number: int) -> list[_Range]:
        """Return what remains when `number` has arrived: up to two ranges."""
        parts = ((self.first, number - 1), (number + 1, self.last))
        return [_Range(first, last, self.since, self.is_lost) for first, last in parts if first <= last]


class _Sender:
    """One sequence.

    Attributes:
        next: The number expected next; None before the first message.
        time: When the latest message was sent, by the sender's clock.
        missing: Numbers that did not arrive, in ascending order.
        given_up: Number of messages that are no longer waited for, but not yet counted as lost.
    """

    __slots__ = ("given_up", "key", "last_loss", "lost", "missing", "next", "time")

    def __init__(self, key: Key) -> None:
        self.key = key
        self.next: int | None = None
        self.time: float | None = None
        self.missing: list[_Range] = []
        self.given_up = 0
        self.lost = 0
        self.last_loss = 0.0

    def give_up(self, count: int) -> None:
        """Stop waiting for the first `count` ranges."""
        self.given_up += sum(len(missing) for missing in self.missing[:count] if not missing.is_lost)
        del self.missing[:count]

    def loss(self, lost: int) -> Loss:
        (host, port), id_, script = self.key
        return Loss(f"{host}:{port}", sanitize(id_, _MAX_NAME), sanitize(script, _MAX_NAME), lost, self.last_loss)


class Sequences:
    """The sequences of all senders. Call `seen` and `settle` from one thread; read the figures from any.

    Args:
        clock: Returns unix time.
        monotonic: Returns seconds of CLOCK_MONOTONIC.

    Attributes:
        lost (int): Number of messages that did not arrive.
        reordered (int): Number of messages that arrived after a later one.
    """

    def __init__(self, clock: Callable[[], float] = time.time, monotonic: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._monotonic = monotonic
        # Two generations: a sender that is silent while MAX_SENDERS / 2 others send is forgotten. A message in order
        # then costs one look-up (0.3 us).
        self._senders: dict[Key, _Sender] = {}
        self._former: dict[Key, _Sender] = {}
        self._unsettled: dict[Key, _Sender] = {}
        self._losers: dict[Key, _Sender] = {}  # latest loss last
        self.lost = 0
        self.reordered = 0

    def seen(self, addr: tuple[str, int], envelope: Mapping[str, Any]) -> None:
        """Account for a message from `addr`. Messages without a sequence number are ignored."""
        number = envelope.get("seq_no")
        if type(number) is not int:
            return
        sent = envelope.get("time")
        if type(sent) is not float:  # any other value could be of any size
            sent = None
        key: Any = (addr, envelope.get("id"), envelope.get("script", ""))
        try:
            sender = self._senders.get(key)
        except TypeError:  # not hashable, e.g. a script that is a list
            return
        if sender is not None and number == sender.next:
            sender.next = number + 1
            sender.time = sent
        elif abs(number) < _NUMBER_MAX:
            sender = sender or self._remember(key)
            if sender is not None:
                # a backend_error announces that the sender itself dropped its previous message as too large
                self._out_of_order(sender, number, sent, excused=envelope.get("type") == "backend_error")

    def _remember(self, key: tuple[Any, ...]) -> _Sender | None:
        """Return the sender with this key, or None if its names are not text or too long."""
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
                self._add_missing(sender, _Range(number - ahead, number - 1 - excused, self._monotonic()))
        elif -MAX_JUMP <= ahead < 0 and not _restarted(sender, number, -ahead, sent):
            self._arrived_late(sender, number)
            return
        else:
            sender.give_up(len(sender.missing))
        sender.next = number + 1
        sender.time = sent

    def _add_missing(self, sender: _Sender, missing: _Range) -> None:
        if len(self._unsettled) < MAX_SENDERS or sender.key in self._unsettled:
            self._unsettled[sender.key] = sender
            sender.missing.append(missing)
            if len(sender.missing) > MAX_RANGES:
                sender.give_up(1)

    def _arrived_late(self, sender: _Sender, number: int) -> None:
        """Remove a number from the missing ones. One that is not missing belongs to a repeated message."""
        for index, missing in enumerate(sender.missing):
            if missing.first <= number <= missing.last:
                sender.missing[index : index + 1] = missing.without(number)
                self.reordered += 1
                self.lost -= missing.is_lost
                sender.lost -= missing.is_lost
                return

    def settle(self) -> list[Loss]:
        """Count the messages whose grace is over, and return the new losses by sender. Called every second."""
        now, wall = self._monotonic(), self._clock()
        losses = []
        for sender in list(self._unsettled.values()):
            lost, sender.given_up = sender.given_up, 0
            waiting = [missing for missing in sender.missing if not missing.is_lost]
            overdue = [missing for missing in waiting if now - missing.since >= GRACE_S]
            for missing in overdue:
                missing.is_lost = True
                sender.last_loss = wall - (now - missing.since)
                lost += len(missing)
            if len(overdue) == len(waiting):
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
        """Return the total losses of the `MAX_SHOWN` senders with the latest ones, the latest first."""
        return [sender.loss(sender.lost) for sender in reversed(list(self._losers.values())) if sender.lost]


def _restarted(sender: _Sender, number: int, behind: int, sent: float | None) -> bool:
    """Whether a number that is behind starts a new sequence, rather than being a late or repeated message."""
    if sent is not None and sender.time is not None:
        return sent > sender.time
    was_missing = any(missing.first <= number <= missing.last for missing in sender.missing)
    return not was_missing and behind > REPEAT_WINDOW
