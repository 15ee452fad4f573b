"""Sends datagrams that are byte for byte those of pysmurf and the smurf-streamer.

Used by `socs-monitor send`, the demo, the tests and the benchmark.
"""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Mapping
from typing import Any, Self, TypeAlias

Address: TypeAlias = tuple[str, int]

# The senders' own size limit in bytes. They replace a larger message with a ``backend_error``.
MAX_DATAGRAM = 64_000

_PYSMURF_VERSION = "8.2.0"


class Publisher:
    """A publisher with its own UDP socket, and a sequence number that counts every message from 0.

    As a context manager it sends ``start`` and ``stop``, as pysmurf's does.

    Args:
        pub_id: Publisher id, e.g. ``crate1slot2`` or ``STREAMER:<stream_id>``.
        address: Host (name, IPv4 or IPv6) and UDP port to send to.
        script: Script id.
    """

    def __init__(self, pub_id: str, address: Address = ("127.0.0.1", 8200), script: str = "undeclared") -> None:
        family, kind, _, _, resolved = socket.getaddrinfo(*address, type=socket.SOCK_DGRAM)[0]
        self._address = resolved
        self._socket = socket.socket(family, kind)
        self.pub_id = pub_id
        self.script = script
        self.host = socket.gethostname()
        self.seq_no = 0

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
        self.close()

    def close(self) -> None:
        """Close the socket."""
        self._socket.close()

    def encode(self, payload: Any, kind: str) -> bytes:
        """Return the datagram of the next message.

        A message of more than `MAX_DATAGRAM` bytes is dropped. Its number is used up, and the datagram is a
        ``backend_error`` that reports the loss.
        """
        envelope = {
            "host": self.host,
            "id": self.pub_id,
            "script": self.script,
            "time": time.time(),
            "seq_no": self.seq_no,
            "type": kind,
            "payload": payload,
        }
        self.seq_no += 1
        datagram = json.dumps(envelope).encode()
        if len(datagram) > MAX_DATAGRAM:
            error = f"Backend error: dropped large UDP packet ({len(datagram)} bytes)."
            return self.encode({"message": error}, "backend_error")
        return datagram

    def send(self, datagram: bytes) -> None:
        """Send bytes unmodified. Succeeds even if nobody listens, like the real senders."""
        self._socket.sendto(datagram, self._address)

    def publish(self, payload: Any, kind: str = "general") -> None:
        """Send a message of any type."""
        self.send(self.encode(payload, kind))

    def start(self) -> None:
        """Send the ``start`` message."""
        self.publish({}, "start")

    def stop(self) -> None:
        """Send the ``stop`` message."""
        self.publish({}, "stop")

    def session_data(self, data: Mapping[str, Any]) -> None:
        """Send data for the session of the pysmurf-controller."""
        self.publish(data, "session_data")

    def session_log(self, message: str) -> None:
        """Send a line for the session log of the pysmurf-controller."""
        self.publish(message, "session_log")

    def metadata(self, path: str, value: Any) -> None:
        """Send the value of the register at a dotted rogue path."""
        self.publish(metadata(path, value), "metadata")

    def data_file(self, path: str, **fields: Any) -> None:
        """Register a pysmurf file; `fields` are the parameters of the function `data_file`."""
        self.publish(data_file(path, **fields), "data_file")

    def g3_file(self, path: str) -> None:
        """Register a timestream file that the streamer has closed."""
        self.publish(g3_file(path), "g3_file")


def data_file(
    path: str,
    *,
    file_type: str = "emulated",
    file_format: str = "",
    timestamp: float | None = None,
    action: str | None = None,
    action_ts: str | int | None = None,
    plot: bool = False,
) -> dict[str, Any]:
    """Return the payload of a ``data_file`` message. `timestamp` (default: now) and `action_ts` are unix times."""
    return {
        "path": path,
        "type": file_type,
        "format": file_format,
        "timestamp": time.time() if timestamp is None else timestamp,
        "action": action,
        "action_ts": action_ts,
        "plot": plot,
        "pysmurf_version": _PYSMURF_VERSION,
    }


def g3_file(path: str) -> dict[str, Any]:
    """Return the payload of a ``g3_file`` message."""
    return {"path": path, "archive_name": "timestreams"}


def metadata(path: str, value: Any) -> dict[str, Any]:
    """Return the payload of a ``metadata`` message."""
    return {"path": path, "value": value, "type": type(value).__name__}
