"""A registration on its way through the spool: `Incoming`, then `Record`, then `Registration`; and what changes it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from socs_monitor.spool.states import Event, State
from socs_monitor.wire import messages
from socs_monitor.wire.text import sanitize


class Incoming(NamedTuple):
    """A registration to be stored; `received` is unix time, `sender` is ``host:port``."""

    received: float
    sender: str
    message: str


class Registration(dict[str, Any]):
    """The metadata of one registered file (payload plus ``pub_id``), with its key and counters in the spool.

    Attributes:
        id (int): Its key in the spool.
        received (float): Unix time of acceptance.
        sender (str): ``host:port``.
        attempts (int): Number of failed attempts to read its file, as of when it was claimed.
        rounds (int): 0 if its row was never committed, otherwise 1 plus the number of changes of its file.
    """

    __slots__ = ("attempts", "id", "received", "rounds", "sender")

    def __init__(
        self,
        meta: dict[str, Any],
        id: int,  # noqa: A002
        received: float,
        sender: str,
        attempts: int = 0,
        rounds: int = 0,
    ) -> None:
        self.update(meta)
        self.id = id
        self.received = received
        self.sender = sender
        self.attempts = attempts
        self.rounds = rounds


class Record(NamedTuple):
    """A registration as it is stored; the fields are the columns described in `file`.

    `message` is None in a claimed registration whose file is only to be checked again.
    """

    id: int
    state: State
    attempts: int
    rounds: int
    received: float
    sender: str
    reason: str | None
    refused: int
    message: str | None

    def summary(self) -> dict[str, Any]:
        """Return what a person needs to know about a dead letter."""
        try:
            path = messages.parse_file(self.message or "").meta["path"]
        except messages.MessageError:
            path = self.message
        return {
            "id": self.id,
            "received": self.received,
            "sender": self.sender,
            "path": sanitize(path),
            "reason": self.reason,
            "refused": bool(self.refused),
            "attempts": self.attempts,
        }


class Transition(NamedTuple):
    """An event and the registrations to which it happened.

    Attributes:
        origin: The state that they are expected to be in.
        event: The event.
        ids: Their keys.
        due: When to process them next, seconds of CLOCK_MONOTONIC; None if the caller keeps them.
        reason: Why they are waiting or dead, for a person.
    """

    origin: State
    event: Event
    ids: Sequence[int]
    due: float | None = None
    reason: str | None = None
