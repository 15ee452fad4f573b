"""Fixtures for the tests that need no other process."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from socs_monitor.spool.store import Spool
from tests.chain import Chain, Clock


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def chain(tmp_path: Path, clock: Clock) -> Iterator[Chain]:
    """A chain that has begun and found nothing to do."""
    chain = Chain(tmp_path, clock, clock.monotonic, busy_timeout=0.0)
    chain.registrar.begin()
    chain.step()
    yield chain
    chain.crash()


@pytest.fixture
def path(tmp_path: Path) -> str:
    """Of a spool."""
    return str(tmp_path / "spool")


@pytest.fixture
def said() -> list[str]:
    """What was reported."""
    return []


@pytest.fixture
def open_spool(path: str, said: list[str]) -> Iterator[Callable[..., Spool]]:
    """Opens the spool; all are closed in the end."""
    opened: list[Spool] = []

    def open_it(**options: Any) -> Spool:
        opened.append(Spool(path, said.append, **options))
        return opened[-1]

    yield open_it
    for spool in opened:
        spool.close()


class Listener:
    """A UDP socket, and what has arrived there."""

    def __init__(self, host: str = "127.0.0.1") -> None:
        self.socket = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_DGRAM)
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 22)
        self.socket.bind((host, 0))
        self.socket.settimeout(5)
        self.address = self.socket.getsockname()[:2]

    def raw(self) -> bytes:
        return self.socket.recv(1 << 16)

    def receive(self, count: int) -> list[dict[str, Any]]:
        """The next messages; fewer is an error, more is too."""
        messages = [json.loads(self.raw()) for _ in range(count)]
        self.socket.setblocking(False)
        with pytest.raises(BlockingIOError):
            self.raw()
        self.socket.settimeout(5)
        return messages


@pytest.fixture
def listener() -> Iterator[Listener]:
    listener = Listener()
    yield listener
    listener.socket.close()
