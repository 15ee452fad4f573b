"""The UDP port: reads datagrams in batches, survives errors of its socket, and gives way to other work in a flood.

Losses that the kernel reports are counted.
"""

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

# Size of the largest possible datagram. Twisted's default would truncate at 8,192 bytes.
MAX_DATAGRAM = 65_535

# Default receive buffer to request, in bytes: a burst of some 20,000 registrations.
BUFFER = 32 * 1024 * 1024

# Datagrams read before the reactor does other work. Twisted counts bytes instead, so empty datagrams never count.
_BATCH = 256

# Seconds for which the socket is left alone after a read, so that datagrams gather and share the cost of a read, a
# spool commit and a database commit. While fewer than FEW gather, the pause is longer; at 200 datagrams/s, that saves a
# third of the CPU time. A single datagram is read at once, and the next one soon after. With a small buffer, the pause
# is at most the time in which a flood fills it.
GATHER_S = 0.045
GATHER_FEW_S = 0.08
FEW = 20
ALONE_S = 0.01
_FLOOD = 400e6  # bytes per second, including the kernel's overhead

# Bytes that the smallest datagram occupies in the buffer, whose real size is twice the requested one.
_SMALLEST = 768

_REBIND_S = 1.0

_SO_RCVBUFFORCE = 33  # Linux: may exceed rmem_max, given the privilege; Python has no name for it

# Linux: figures of a socket. The last one is the number of datagrams dropped because the buffer was full.
_SO_MEMINFO = 55
_MEMINFO = struct.Struct("=9I")


class Receiver(udp.Port):
    """A UDP port that is bound again after an error.

    Args:
        port: UDP port.
        protocol: Receives the datagrams.
        interface: Address of the interface to listen on, IPv4 or IPv6; empty for all IPv4 interfaces.
        reactor: The reactor.
        buffer: Receive buffer to request, in bytes.
        report: Called with the level, event, text and keys of a log line.
        after_read: Called after `protocol` has received a batch.

    Attributes:
        asked (int): Requested receive buffer, in bytes.
        buffer (int): Receive buffer granted by the kernel, in bytes.
        rebinds (int): How often the port was bound again after an error.
        listening (bool): Whether datagrams can arrive. False while the port cannot be bound.
        dropped (int): Number of datagrams dropped by the kernel, as of the latest `measure`.
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
        self._dropped_before = 0  # by sockets that are closed now

    def createInternetSocket(self) -> socket.socket:
        """Create the socket and set its receive buffer."""
        sock: socket.socket = super().createInternetSocket()
        for option in (_SO_RCVBUFFORCE, socket.SO_RCVBUF):
            try:
                sock.setsockopt(socket.SOL_SOCKET, option, self.asked)
                break
            except PermissionError:
                continue
        # the kernel doubles the requested size to cover its overhead, and reports the doubled size
        self.buffer = sock.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF) // 2
        return sock

    def startListening(self) -> None:
        """Bind the port and read from it."""
        super().startListening()  # type: ignore[no-untyped-call]
        self.listening = True

    def connectionLost(self, reason: object = None) -> None:
        """Close the port after reading what has arrived."""
        self.drain()
        super().connectionLost(reason)  # type: ignore[no-untyped-call]

    def doRead(self) -> None:
        """Read a batch of datagrams. Bind the port again if that fails."""
        try:
            count = self._read()
        except OSError as error:
            text = f"UDP port {self._realPortNumber} failed: {error}. It is being bound again"
            self._report("warn", "socket", text, port=self._realPortNumber)
            self.listening = False
            self.measure()
            self._dropped_before = self.dropped
            self.port = self._realPortNumber
            self.stopReading()  # type: ignore[no-untyped-call]
            self.socket.close()
            self._rebind()
            return
        if 0 < count < _BATCH:
            self.stopReading()  # type: ignore[no-untyped-call]
            pause = ALONE_S if count == 1 else GATHER_FEW_S if count < FEW else GATHER_S
            self.reactor.callLater(min(pause, self.buffer / _FLOOD), self._read_on)
        else:  # there may be more; or nothing came for a while, and the next datagram is to be read at once
            self.startReading()  # type: ignore[no-untyped-call]

    def _read_on(self) -> None:
        if self.connected:
            self.doRead()

    def _rebind(self) -> None:
        try:
            self._bindSocket()  # type: ignore[no-untyped-call]
        except CannotListenError as error:
            text = (
                f"Cannot bind the UDP port again: {error}. Messages sent now are lost. The agent tries again every"
                f" {_REBIND_S:.0f} s; find the program that uses the port. Run: ss -ulpn"
            )
            self._report("error", "socket", text, port=self.port)
            self.reactor.callLater(_REBIND_S, self._rebind)
        else:
            self.rebinds += 1
            self.listening = True
            self.startReading()  # type: ignore[no-untyped-call]

    def measure(self) -> None:
        """Ask the kernel how many datagrams it dropped."""
        try:
            figures = self.socket.getsockopt(socket.SOL_SOCKET, _SO_MEMINFO, _MEMINFO.size)
        except OSError:  # a kernel older than 4.12, or a broken socket
            return
        self.dropped = self._dropped_before + _MEMINFO.unpack(figures)[-1]

    def drain(self) -> None:
        """Read everything that has arrived, if the port is open; in a flood, no more than the buffer holds."""
        with contextlib.suppress(OSError):
            for _ in range(2 * self.buffer // _SMALLEST // _BATCH + 1):
                if not self.connected or self._read() < _BATCH:
                    break

    def _read(self) -> int:
        """Read up to `_BATCH` datagrams. Return their number."""
        receive, deliver = self.socket.recvfrom, self.protocol.datagramReceived
        try:
            for count in range(_BATCH):
                try:
                    data, addr = receive(MAX_DATAGRAM)
                except (BlockingIOError, InterruptedError, ConnectionRefusedError):
                    return count
                try:
                    deliver(data, addr[:2])
                except Exception as error:  # noqa: BLE001 (Twisted would close the port, and nobody would notice)
                    text = (
                        f"Unexpected error while processing a datagram from {addr[0]}: {error!r}. The datagram was"
                        " dropped. Please report it"
                    )
                    sender = f"{addr[0]}:{addr[1]}"
                    self._report("error", "internal_error", text, sender=sender, traceback=traceback.format_exc())
            return _BATCH
        finally:
            self._after_read()
