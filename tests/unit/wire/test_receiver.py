"""The receiver over real sockets of the loopback, with a clock for a reactor: no error makes it deaf."""

from __future__ import annotations

import errno
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from twisted.internet.error import CannotListenError
from twisted.internet.protocol import DatagramProtocol
from twisted.internet.task import Clock

from socs_monitor.health.events import line
from socs_monitor.wire import receiver as udp
from tests.hostile import queue_of
from tests.testbed.ports import free_udp_port
from tests.testbed.processes import wait_until

ASKED = 100_000

# Twisted leaves the closing of a socket that it cannot bind to Python.
twisted_lets_go_of_it = pytest.mark.filterwarnings("ignore:unclosed <socket:ResourceWarning")


class Reactor(Clock):
    """Time that passes when told to, and the set of what is read from."""

    def __init__(self) -> None:
        super().__init__()
        self.readers: set[Any] = set()

    def addReader(self, reader: Any) -> None:
        self.readers.add(reader)

    def removeReader(self, reader: Any) -> None:
        self.readers.discard(reader)

    def removeWriter(self, writer: Any) -> None:
        """Nobody writes."""


class Broken:
    """A real socket of which reading fails in the ways given, one after the other, and then works."""

    def __init__(self, real: socket.socket, *errors: Exception) -> None:
        self._real = real
        self.errors = list(errors)

    def recvfrom(self, size: int) -> Any:
        if self.errors:
            raise self.errors.pop(0)
        return self._real.recvfrom(size)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)


class Bench(DatagramProtocol):
    """A receiver that listens, what it delivered, and a sender."""

    def __init__(self, interface: str = "127.0.0.1", buffer: int = ASKED) -> None:
        self.received: list[tuple[bytes, Any]] = []
        self.said: list[str] = []
        self.fail_at: Callable[[bytes], bool] = lambda _: False
        self.reactor = Reactor()
        port = free_udp_port()
        self.read_at: list[int] = []
        self.receiver = self.listener(port, interface, buffer)
        self.receiver.startListening()
        self.address = (interface, port)
        self.sender = socket.socket(self.receiver.addressFamily, socket.SOCK_DGRAM)

    def say(self, level: str, event: str, text: str, **keys: object) -> None:
        assert level in ("warn", "error")
        self.said.append(line(event, text, keys))

    def listener(self, port: int, interface: str = "127.0.0.1", buffer: int = ASKED) -> udp.Receiver:
        return udp.Receiver(
            port,
            self,
            interface,
            self.reactor,
            buffer=buffer,
            report=self.say,
            after_read=lambda: self.read_at.append(len(self.received)),
        )

    def datagramReceived(self, datagram: bytes, addr: Any) -> None:
        if self.fail_at(datagram):
            raise RuntimeError("never thought of")
        self.received.append((datagram, addr))

    def send(self, *datagrams: bytes) -> None:
        for datagram in datagrams:
            self.sender.sendto(datagram, self.address)

    def read(self) -> list[bytes]:
        """Have everybody read who is asked to, once, and return what was delivered since the last call.

        Time passes until the receiver, which leaves its socket alone for a while, reads again.
        """
        self.reactor.advance(udp.GATHER_S)
        for reader in list(self.reactor.readers):
            reader.doRead()
        got = [datagram for datagram, _ in self.received]
        self.received.clear()
        return got

    def break_socket(self, *errors: Exception) -> Broken:
        self.receiver.socket = Broken(self.receiver.socket, *errors)
        return self.receiver.socket

    def close(self) -> None:
        self.sender.close()
        if self.receiver.connected:
            self.receiver.socket.close()


@pytest.fixture
def bench() -> Iterator[Bench]:
    bench = Bench()
    yield bench
    bench.close()


def test_datagrams_arrive_whole_and_in_order_with_the_address_of_their_sender(bench: Bench) -> None:
    bench.sender.bind(("127.0.0.1", 0))
    largest = b"x" * 65_507  # all that IPv4 leaves of 65,535
    bench.send(b"first", b"", largest)
    wait_until(lambda: queue_of(bench.address[1]).bytes > len(largest), 5, "all have arrived")

    assert bench.receiver in bench.reactor.readers
    bench.receiver.doRead()
    assert bench.received == [(datagram, bench.sender.getsockname()) for datagram in (b"first", b"", largest)]


def test_ipv6_addresses_are_host_and_port_too() -> None:
    bench = Bench("::1")
    bench.send(b"x")
    bench.receiver.doRead()
    bench.close()

    ((datagram, addr),) = bench.received
    assert (datagram, addr[0], len(addr)) == (b"x", "::1", 2)


def test_with_nothing_to_read_it_returns(bench: Bench) -> None:
    bench.receiver.doRead()

    assert (bench.received, bench.said, bench.receiver.rebinds) == ([], [], 0)


@pytest.mark.parametrize("datagram", [b"", b"x"], ids=["empty", "tiny"])
def test_a_flood_leaves_the_reactor_time_for_others(bench: Bench, datagram: bytes, monkeypatch: Any) -> None:
    monkeypatch.setattr(udp, "_BATCH", 10)
    bench.send(*[datagram] * 25)

    assert [len(bench.read()) for _ in range(4)] == [10, 10, 5, 0]


def test_a_single_datagram_is_read_at_once_and_following_ones_are_batched() -> None:
    bench = Bench(buffer=udp.BUFFER)
    reading = {bench.receiver}
    for _ in range(2):
        assert bench.reactor.readers == reading
        bench.send(b"alone")
        bench.receiver.doRead()
        pause = udp.ALONE_S
        for datagrams in ([b"1"] * udp.FEW, [b"2"] * (udp.FEW - 1), [b"3", b"4"], [b"5"]):
            assert bench.reactor.readers == set()
            bench.send(*datagrams)
            bench.reactor.advance(pause - 0.001)
            assert bench.read_at.pop() == len(bench.received)
            bench.received.clear()
            bench.reactor.advance(0.001)
            assert [datagram for datagram, _ in bench.received] == datagrams
            pause = udp.GATHER_S if len(datagrams) >= udp.FEW else udp.GATHER_FEW_S
        assert bench.reactor.readers == set()
        bench.reactor.advance(udp.ALONE_S)
        bench.received.clear()
    bench.close()


def test_a_small_buffer_is_read_before_a_flood_can_fill_it(bench: Bench) -> None:
    bench.send(b"1", b"2")
    bench.receiver.doRead()
    assert bench.reactor.readers == set()
    bench.reactor.advance(ASKED / 400e6)

    assert bench.reactor.readers == {bench.receiver}


def test_what_has_arrived_is_read_before_the_port_is_closed(bench: Bench) -> None:
    bench.receiver.doRead()
    bench.send(b"x")
    bench.receiver.stopListening()
    bench.reactor.advance(udp.GATHER_S)

    assert [datagram for datagram, _ in bench.received] == [b"x"]
    assert bench.reactor.readers == set()


def test_drain_reads_all_that_has_arrived(bench: Bench, monkeypatch: Any) -> None:
    monkeypatch.setattr(udp, "_BATCH", 10)
    bench.send(*[b"x"] * 35)
    bench.receiver.drain()

    assert len(bench.received) == 35


@pytest.mark.parametrize(
    "error", [errno.ENOBUFS, errno.ENETDOWN, errno.EBADF, errno.EIO, errno.ENOMEM], ids=errno.errorcode.get
)
def test_the_port_is_bound_again_after_an_unexpected_socket_error(bench: Bench, error: int) -> None:
    broken = bench.break_socket(OSError(error, "the socket is broken"))
    bench.send(b"lost with the socket")
    bench.read()

    assert broken.fileno() == -1, "the broken socket is still open"
    assert (bench.receiver.rebinds, bench.reactor.readers) == (1, {bench.receiver})
    assert len(bench.said) == 1
    assert f"{bench.address[1]} failed" in bench.said[0]
    assert "the socket is broken" in bench.said[0]
    bench.send(b"heard again")
    assert bench.read() == [b"heard again"]
    assert bench.receiver.getHost().port == bench.address[1]


def test_it_is_bound_again_as_often_as_it_takes(bench: Bench) -> None:
    for _ in range(5):
        bench.break_socket(OSError(errno.EIO, "broken"))
        bench.read()
    bench.send(b"heard again")

    assert bench.receiver.rebinds == 5
    assert bench.read() == [b"heard again"]


@twisted_lets_go_of_it
def test_a_port_in_use_is_tried_until_it_is_free(bench: Bench) -> None:
    bench.break_socket(OSError(errno.EIO, "broken"))
    bench.receiver.socket._real.close()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as other:
        other.bind(bench.address)
        bench.read()
        for _ in range(3):
            bench.reactor.advance(1)
        assert bench.receiver.rebinds == 0
        assert bench.reactor.readers == set(), "a closed socket is still read from"
        assert "in use" in bench.said[-1]
    bench.reactor.advance(1)
    bench.send(b"heard again")

    assert bench.receiver.rebinds == 1
    assert bench.read() == [b"heard again"]


@pytest.mark.parametrize("error", [BlockingIOError(), InterruptedError(), ConnectionRefusedError()], ids=repr)
def test_errors_of_a_healthy_socket_are_ignored(bench: Bench, error: OSError) -> None:
    bench.break_socket(error)
    bench.send(b"x")

    assert bench.read() == []
    assert bench.read() == [b"x"]
    assert (bench.said, bench.receiver.rebinds) == ([], 0)


def test_an_error_in_one_datagram_is_reported_and_the_others_are_delivered(bench: Bench) -> None:
    bench.fail_at = lambda datagram: datagram == b"2"
    bench.send(b"1", b"2", b"3")

    assert bench.read() == [b"1", b"3"]
    bench.reactor.advance(udp.GATHER_S)
    assert (bench.receiver.rebinds, bench.reactor.readers) == (0, {bench.receiver})
    (said,) = bench.said
    assert "Unexpected error while processing a datagram from 127.0.0.1" in said
    assert "never thought of" in said


def test_the_buffer_is_what_the_kernel_granted(bench: Bench) -> None:
    granted = bench.receiver.socket.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF)

    assert bench.receiver.buffer == ASKED == granted // 2
    bench.break_socket(OSError(errno.EIO, "broken"))
    bench.read()
    assert bench.receiver.socket.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF) == granted, "lost at binding again"


def test_without_privileges_the_buffer_is_what_the_system_allows(monkeypatch: Any) -> None:
    monkeypatch.setattr(udp, "_SO_RCVBUFFORCE", socket.SO_RCVBUF)  # which takes no more than the system allows
    allowed = int(Path("/proc/sys/net/core/rmem_max").read_text())
    bench = Bench(buffer=2 * allowed)
    bench.close()

    assert bench.receiver.buffer == allowed


@twisted_lets_go_of_it
def test_a_port_in_use_is_an_error_at_the_start(bench: Bench) -> None:
    second = bench.listener(bench.address[1])
    with pytest.raises(CannotListenError, match="in use"):
        second.startListening()


def overflow(bench: Bench) -> int:
    """Send more than the buffer holds, and return how many of it the kernel had no room for."""
    count = 4 * ASKED // 1000
    bench.send(*[b"x" * 1000] * count)
    return count - sum(len(bench.read()) for _ in range(count))


def test_what_the_kernel_dropped_is_counted(bench: Bench) -> None:
    bench.receiver.measure()
    assert bench.receiver.dropped == 0
    dropped = overflow(bench)
    assert dropped > 0
    bench.receiver.measure()

    assert bench.receiver.dropped == dropped


def test_what_was_dropped_is_counted_over_all_sockets(bench: Bench) -> None:
    dropped = overflow(bench)
    bench.break_socket(OSError(errno.EIO, "broken"))
    bench.read()
    assert bench.receiver.rebinds == 1
    dropped += overflow(bench)
    bench.receiver.measure()
    bench.receiver.measure()

    assert bench.receiver.dropped == dropped


def test_a_kernel_that_reports_no_drops_is_no_error(bench: Bench, monkeypatch: Any) -> None:
    monkeypatch.setattr(udp, "_SO_MEMINFO", 4711)  # an option that no kernel knows
    bench.receiver.measure()

    assert bench.receiver.dropped == 0


@twisted_lets_go_of_it
def test_it_does_not_listen_while_another_program_has_the_port(bench: Bench) -> None:
    assert bench.receiver.listening
    bench.break_socket(OSError(errno.EIO, "broken"))
    bench.receiver.socket._real.close()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as other:
        other.bind(bench.address)
        bench.read()
        assert not bench.receiver.listening
        bench.receiver.measure()
    bench.reactor.advance(1)

    assert bench.receiver.listening
