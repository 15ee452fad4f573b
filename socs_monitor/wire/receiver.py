"""The UDP socket: its buffer, its size of datagrams, and a reader that no flood can turn into an endless loop."""

from __future__ import annotations

import contextlib
import socket
import struct
import traceback
from collections.abc import Callable

from twisted.internet import udp
from twisted.internet.error import CannotListenError
from twisted.internet.interfaces import IReactorCore
from twisted.internet.protocol import DatagramProtocol

# The largest datagram there can be; Twisted's default cuts them at 8,192 bytes.
MAX_DATAGRAM = 65_535

# Receive buffer asked for by default (bytes): a burst of some 20,000 registrations.
BUFFER = 32 * 1024 * 1024

# Datagrams read before the reactor turns to other things. Twisted counts bytes, and so empty ones not at all.
_AT_A_TIME = 256

# After a read the socket is left alone for a while (seconds): what comes meanwhile gathers in its buffer and shares the
# cost of a reading, of a commit to the spool and of one to the database, which is that of many messages. While fewer
# than `FEW` gather, as at 200 a second, it is longer, which saves a third of the CPU. One that comes alone is
# read at once, and the next one soon after. Where the kernel granted little, it is at most as long as a flood takes to
# fill that.
GATHER_S = 0.045
GATHER_FEW_S = 0.08
FEW = 20
ALONE_S = 0.01
_FLOOD = 400e6  # bytes a second, with the kernel's own book-keeping

# What the smallest datagram takes in the buffer (bytes), of which there is twice what is asked for.
_SMALLEST = 768

_REBIND_S = 1.0

_SO_RCVBUFFORCE = 33  # Linux: goes past rmem_max where the process may; Python has no name for it

# Linux: figures of a socket, the last of which is how many datagrams it had no room for.
_SO_MEMINFO = 55
_MEMINFO = struct.Struct("=9I")


class Receiver(udp.Port):
    """A listening UDP port that an error does not close for good.

    Args:
        port: UDP port.
        protocol: Gets what arrives.
        interface: Address of the interface to listen on, IPv4 or IPv6; empty for all of IPv4.
        reactor: The reactor.
        buffer: Receive buffer to ask for, bytes.
        report: Called with level, event and text of what belongs in the log, and further keys of that line.
        after_read: Called when `protocol` has got all that was read in one go.

    Attributes:
        asked (int): The receive buffer that is asked for (bytes).
        buffer (int): The receive buffer that the kernel granted (bytes).
        rebinds (int): How often the port was bound again after an error.
        listening (bool): Whether datagrams can arrive; False while the port cannot be bound again.
        dropped (int): Number of datagrams that the kernel had no room for, as of the latest `measure`.
    """

    def __init__(
        self,
        port: int,
        protocol: DatagramProtocol,
        interface: str,
        reactor: IReactorCore,
        *,
        buffer: int,
        report: Callable[..., None],
        after_read: Callable[[], None],
    ) -> None:
        super().__init__(port, protocol, interface, MAX_DATAGRAM, reactor)  # type: ignore[no-untyped-call]
        self.asked = buffer
        self._report = report
        self._after_read = after_read
        self.buffer = 0
        self.rebinds = 0
        self.listening = False
        self.dropped = 0
        self._dropped_before = 0  # by sockets that are closed

    def createInternetSocket(self) -> socket.socket:
        """Make the socket, with the buffer."""
        sock: socket.socket = super().createInternetSocket()
        for option in (_SO_RCVBUFFORCE, socket.SO_RCVBUF):
            try:
                sock.setsockopt(socket.SOL_SOCKET, option, self.asked)
                break
            except PermissionError:
                continue
        # the kernel doubles what is asked for, to pay for its own book-keeping, and says so when asked
        self.buffer = sock.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF) // 2
        return sock

    def doRead(self) -> None:
        """Read what has arrived, up to a number of datagrams."""
        try:
            count = self._read(_AT_A_TIME)
        except OSError as error:
            text = f"the UDP port {self._realPortNumber} failed: {error}; binding it again"
            self._report("warn", "socket", text, port=self._realPortNumber)
            self.listening = False
            self.measure()
            self._dropped_before = self.dropped
            self.port = self._realPortNumber
            self.stopReading()  # type: ignore[no-untyped-call]
            self.socket.close()
            self._rebind()
            return
        if 0 < count < _AT_A_TIME:
            self.stopReading()  # type: ignore[no-untyped-call]
            pause = ALONE_S if count == 1 else GATHER_FEW_S if count < FEW else GATHER_S
            self.reactor.callLater(min(pause, self.buffer / _FLOOD), self._read_on)
        else:  # there may be more, or nothing came for a while: whatever comes is to be read at once
            self.startReading()  # type: ignore[no-untyped-call]

    def _read_on(self) -> None:
        if self.connected:
            self.doRead()

    def connectionLost(self, reason: object = None) -> None:
        """Close the port, but not before what has arrived is read."""
        self.drain()
        super().connectionLost(reason)  # type: ignore[no-untyped-call]

    def _rebind(self) -> None:
        try:
            self._bindSocket()  # type: ignore[no-untyped-call]
        except CannotListenError as error:
            text = f"{error}. No datagram arrives; trying again every {_REBIND_S:.0f} s"
            self._report("error", "socket", text, port=self.port)
            self.reactor.callLater(_REBIND_S, self._rebind)
        else:
            self.rebinds += 1
            self.listening = True
            self.startReading()  # type: ignore[no-untyped-call]

    def startListening(self) -> None:
        """Bind the port, and read from it."""
        super().startListening()  # type: ignore[no-untyped-call]
        self.listening = True

    def measure(self) -> None:
        """Ask the kernel how many datagrams it dropped."""
        try:
            figures = self.socket.getsockopt(socket.SOL_SOCKET, _SO_MEMINFO, _MEMINFO.size)
        except OSError:  # a kernel older than 4.12, or a socket that is broken
            return
        self.dropped = self._dropped_before + _MEMINFO.unpack(figures)[-1]

    def drain(self) -> None:
        """Read all that has arrived, if the port is open; of a flood no more than its buffer holds."""
        with contextlib.suppress(OSError):
            for _ in range(2 * self.buffer // _SMALLEST // _AT_A_TIME + 1):
                if not self.connected or self._read(_AT_A_TIME) < _AT_A_TIME:
                    break

    def _read(self, at_most: int) -> int:
        """Read up to `at_most` datagrams; return how many there were."""
        try:
            return self._deliver(at_most)
        finally:
            self._after_read()

    def _deliver(self, at_most: int) -> int:
        receive, deliver = self.socket.recvfrom, self.protocol.datagramReceived
        for count in range(at_most):
            try:
                data, addr = receive(MAX_DATAGRAM)
            except (BlockingIOError, InterruptedError, ConnectionRefusedError):
                return count
            try:
                deliver(data, addr[:2])
            except Exception:  # noqa: BLE001 (Twisted would close the port, and nobody would notice)
                text = f"unforeseen error at a datagram from {addr[0]}, which is dropped; please report it"
                sender = f"{addr[0]}:{addr[1]}"
                self._report("error", "internal_error", text, sender=sender, traceback=traceback.format_exc())
        return at_most
