"""The UDP socket: its buffer, its size of datagrams, and a reader that no flood can turn into an endless loop."""

from __future__ import annotations

import socket

from twisted.internet import udp
from twisted.internet.interfaces import IReactorCore
from twisted.internet.protocol import DatagramProtocol

# The largest datagram there can be; Twisted's default cuts them at 8,192 bytes.
MAX_DATAGRAM = 65_535

# Receive buffer asked for (bytes): a burst of some 20,000 registrations.
BUFFER = 32 * 1024 * 1024

# Datagrams read before the reactor turns to other things. Twisted counts bytes, and so empty ones not at all.
_AT_A_TIME = 256

_SO_RCVBUFFORCE = 33  # Linux: goes past rmem_max where the process may; Python has no name for it


class Receiver(udp.Port):
    """A listening UDP port. Attribute `buffer` is the receive buffer that the kernel granted (bytes)."""

    buffer = 0

    def createInternetSocket(self) -> socket.socket:
        """Make the socket, with the buffer."""
        sock: socket.socket = super().createInternetSocket()
        for option in (_SO_RCVBUFFORCE, socket.SO_RCVBUF):
            try:
                sock.setsockopt(socket.SOL_SOCKET, option, BUFFER)
                break
            except PermissionError:
                continue
        # the kernel doubles what is asked for, to pay for its own book-keeping, and says so when asked
        self.buffer = sock.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF) // 2
        return sock

    def doRead(self) -> None:
        """Read what has arrived, up to a number of datagrams."""
        self._read(_AT_A_TIME)

    def drain(self) -> None:
        """Read all that has arrived."""
        while self._read(_AT_A_TIME):
            pass

    def _read(self, at_most: int) -> bool:
        """Read up to `at_most` datagrams; return whether there may be more."""
        receive, deliver = self.socket.recvfrom, self.protocol.datagramReceived
        for _ in range(at_most):
            try:
                data, addr = receive(MAX_DATAGRAM)
            except (BlockingIOError, InterruptedError, ConnectionRefusedError):
                return False
            deliver(data, addr[:2])
        return True


def listen(reactor: IReactorCore, port: int, protocol: DatagramProtocol, interface: str = "") -> Receiver:
    """Bind a UDP port and deliver what arrives to `protocol`.

    Raises:
        twisted.internet.error.CannotListenError: If the port cannot be bound.
    """
    receiver = Receiver(port, protocol, interface, MAX_DATAGRAM, reactor)  # type: ignore[no-untyped-call]
    receiver.startListening()  # type: ignore[no-untyped-call]
    return receiver
