"""UDP and TCP ports of the loopback interface: find a free one, and see whether one is bound."""

from __future__ import annotations

import contextlib
import random
import socket


def free_udp_port() -> int:
    """Return a free UDP port."""
    return _free_port(socket.SOCK_DGRAM)


def free_tcp_port() -> int:
    """Return a free TCP port."""
    return _free_port(socket.SOCK_STREAM)


def _free_port(kind: socket.SocketKind) -> int:
    # Below the range from which the kernel assigns ports by itself, so no sender or client takes the port meanwhile.
    while True:
        port = random.randrange(15_000, 32_000)
        with socket.socket(socket.AF_INET, kind) as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def udp_port_is_bound(port: int) -> bool:
    """Return whether any process of this host has bound the UDP port."""
    for table in ("/proc/net/udp", "/proc/net/udp6"):
        with contextlib.suppress(FileNotFoundError), open(table) as lines:
            if any(line.split()[1].endswith(f":{port:04X}") for line in lines if ":" in line.split()[1]):
                return True
    return False


def tcp_port_is_bound(port: int) -> bool:
    """Return whether a process listens on the TCP port of the loopback interface."""
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
        return True
    return False
