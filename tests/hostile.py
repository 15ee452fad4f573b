"""What hostile or broken senders send: damaged datagrams, hostile registrations, floods.

`python -m tests.hostile PORT SECONDS` floods a port with empty, tiny and broken datagrams, as fast as it can.
"""

from __future__ import annotations

import itertools
import json
import random
import socket
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from socs_monitor.wire.publisher import Publisher, data_file, g3_file, metadata
from tests.testbed.processes import OWN_BIN, Process, wait_until
from tests.testbed.smurf_server import REGISTERS

EMPTY, NOT_JSON, WRONG = "empty", "not JSON", "wrong or missing field"

# Values that are wrong for nearly every field.
ODD_VALUES: Sequence[Any] = (
    *(None, True, 0, -1, 2**63, 2**64, -(10**4000), 1.5, 1e308, float("nan"), float("inf"), float("-inf"), ""),
    *("\0", "a\0b", "a\nb", 'a"b', "\\", "..", "../../x", "/abs", "~", "é\u2028", "x" * 300, [], [[]], {}, {"a": None}),
)

# Datagrams of a flood: empty, tiny or useless.
USELESS = (b"", b"{", b"\0", b"[" * 200, b'{"id": "a"}', b"\xff" * 20)

# Bytes that the kernel charges a socket's buffer for a datagram beyond its size, at most; and the smallest buffer of an
# agent, which always asks for more than the kernel's limit.
_CHARGED = 2048
_PORTION = int(Path("/proc/sys/net/core/rmem_max").read_text()) // 2


def envelopes(path: str = "/data/smurf_data/20240101/crate1slot2/1700000000_x.txt") -> list[dict[str, Any]]:
    """Return one real message of every type. `path` is what a data_file registers."""
    publisher = Publisher("crate1slot2:s1")
    payloads: list[tuple[Any, str]] = [
        (data_file(path, file_format="npy", action="take_iv", action_ts="1700000000"), "data_file"),
        (data_file(path, file_format="txt", timestamp=1700000000, plot=True), "data_file"),
        (g3_file("/data/so/timestreams/17000/crate1slot2/1700000000_001.g3"), "g3_file"),
        ({"state": "on", "bands": [0, 1]}, "session_data"),
        ("a line", "session_log"),
        *((metadata(path, value), "metadata") for path, value in itertools.islice(REGISTERS.items(), 6)),
        ({}, "start"),
        ({}, "stop"),
        ({"message": "x"}, "log"),
        ({"message": "x"}, "backend_error"),
        ([1, {"a": None}], "general"),
    ]
    made = [json.loads(publisher.encode(payload, kind)) for payload, kind in payloads]
    publisher.close()
    return made


def damaged() -> list[tuple[bytes, str]]:
    """Return datagrams that are not messages, each with the reason under which it is counted."""
    file, _, g3, session, _, register, *_ = envelopes()
    cut = json.dumps(file).encode()
    return [
        (b"", EMPTY),
        *((text, NOT_JSON) for text in (b" ", b"\0", b"{", b"[" * 65_000, b'{"a":' * 13_000, b"\xff\xfe\0", b"nul")),
        *((cut[:length], NOT_JSON) for length in range(1, len(cut), 17)),
        *((cut.replace(b"crate1", bad), NOT_JSON) for bad in (b"\xff", b"\xc3\x28", b"\0")),
        (cut + b"{}", NOT_JSON),
        (b"1" * 5000, NOT_JSON),
        *((text, WRONG) for text in (b"[]", b"1", b'"a"', b"null", b"NaN", b"1e999", b"{}", b"-" + b"1" * 4300)),
        *((encode({**file, "type": value}), WRONG) for value in (None, 1, [], {}, 1.5)),
        *((encode({**session, "id": value}), WRONG) for value in (None, 1, [], {}, 1.5)),
        *((encode({k: v for k, v in file.items() if k != key}), WRONG) for key in ("type", "payload")),
        *((encode({k: v for k, v in session.items() if k != key}), WRONG) for key in ("id", "type", "payload")),
        *((encode({**each, "payload": v}), WRONG) for each in (file, g3, register) for v in (None, 1, "a", [], {})),
        *((_with(each, path=value), WRONG) for each in (file, g3) for value in ("", "a\0b", 1, None, ["/a"], {})),
        *((encode({**session, "payload": value}), WRONG) for value in (None, "text", [], 1)),
        *((encode({**register, "time": value}), WRONG) for value in (None, "1", float("nan"), 1e300, 10**4000)),
    ]  # fmt: skip


def odd_values(path: str = "/data/none.txt") -> list[bytes]:
    """Return real messages with each field replaced by each odd value, or removed. Some are valid, some are not."""
    made: list[dict[str, Any]] = []
    for envelope in envelopes(path):
        for key in envelope:
            made.append({k: v for k, v in envelope.items() if k != key})
            made += [{**envelope, key: value} for value in ODD_VALUES]
        payload = envelope["payload"]
        if isinstance(payload, dict):
            for key in payload:
                made.append({**envelope, "payload": {k: v for k, v in payload.items() if k != key}})
                made += [{**envelope, "payload": {**payload, key: value}} for value in ODD_VALUES]
    return [encode(envelope) for envelope in made]


def mutated(seed: int) -> Iterator[bytes]:
    """Yield real messages with bytes changed, removed and inserted, without end."""
    rng = random.Random(seed)
    real = [encode(envelope) for envelope in envelopes()]
    while True:
        datagram = bytearray(rng.choice(real))
        for _ in range(rng.randint(1, 4)):
            at = rng.randrange(len(datagram) or 1)
            match rng.randrange(4):
                case 0:
                    datagram[at : at + 1] = rng.randbytes(1)
                case 1:
                    del datagram[at : at + rng.randint(1, 40)]
                case 2:
                    datagram[at:at] = rng.choice((b"[", b'"', b"\\u0000", b"\\ud800", b"\0", b"1e999", b"NaN", b"../"))
                case 3:
                    datagram[at:at] = datagram[: rng.randint(1, 200)]
        yield bytes(datagram)


def traversals(path: str) -> list[bytes]:
    """Return registrations of an existing file that would have no remote path, or one outside the archive."""
    file = {**envelopes()[0], "payload": data_file(path, action="a", action_ts="1700000000")}
    g3 = {**envelopes()[2], "payload": g3_file(path)}
    parents = "../" * 12
    ways_out = ("..", ".", "/", "/etc", f"{parents}etc/cron.d/x", "a/b", "a/../../b", "x/..")
    return [
        *(encode({**file, "id": way}) for way in (*ways_out, "")),
        *(_with(file, **{key: way}) for key in ("action", "action_ts") for way in ways_out),
        encode({**g3, "payload": {"path": path}}),
        *(_with(file, archive_name=name) for name in (*ways_out, "", "etc", "smurf/..", "TIMESTREAMS", "\0")),
        *(_with(each, path=path + end) for each in (file, g3) for end in ("/..", "/.", "/", "/../..")),
        *(_with(file, path=relative) for relative in ("../x.txt", "x.txt", "./x", "~/x", "file:///etc/passwd")),
        *(_with(g3, path=short) for short in ("/x.g3", "/a/x.g3", "/../../x.g3", "//", "/")),
        *(encode({**file, "id": odd}) for odd in ("a b", "a\nb", "a\\b", "a\0b", "x" * 300)),
    ]


def _with(envelope: dict[str, Any], **fields: Any) -> bytes:
    return encode({**envelope, "payload": {**envelope["payload"], **fields}})


def encode(envelope: dict[str, Any]) -> bytes:
    return json.dumps(envelope).encode()


class Queue(NamedTuple):
    """State of a UDP socket's receive buffer: bytes that wait in it, and datagrams that were dropped."""

    bytes: int
    drops: int


def queue_of(port: int) -> Queue:
    """Return the state of the only socket that is bound to `port`."""
    for table in ("/proc/net/udp", "/proc/net/udp6"):
        for line in Path(table).read_text().splitlines()[1:]:
            fields = line.split()
            if int(fields[1].rpartition(":")[2], 16) == port:
                return Queue(int(fields[4].partition(":")[2], 16), int(fields[-1]))
    raise AssertionError(f"no socket is bound to UDP port {port}")


def wait_read(port: int) -> None:
    """Wait until the agent has read every datagram from the kernel."""
    wait_until(lambda: queue_of(port).bytes == 0, 30, "the agent has read all datagrams")


def send(port: int, datagrams: Iterable[bytes], host: str = "127.0.0.1") -> int:
    """Send datagrams to an agent on this host, no faster than it reads them, and return their number."""
    count = 0
    waiting = 0
    drops = queue_of(port).drops
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as sender:
        for datagram in datagrams:
            waiting += _CHARGED + 2 * len(datagram)
            if waiting > _PORTION:
                wait_read(port)
                waiting = _CHARGED + 2 * len(datagram)
            sender.sendto(datagram, (host, port))
            count += 1
    wait_read(port)
    assert queue_of(port).drops == drops, "the kernel dropped some: reduce _PORTION"
    return count


class Flood(Process):
    """A process that sends `USELESS` datagrams as fast as it can, for some seconds."""

    def __init__(self, folder: Path, port: int, seconds: float) -> None:
        super().__init__([OWN_BIN / "python", "-m", "tests.hostile", str(port), str(seconds)], folder / "flood.log")

    @property
    def sent(self) -> int:
        """Number of datagrams that it sent, once it has ended."""
        return int(self.log)


def main(port: str, seconds: str) -> None:
    """Flood a port of this host, and print the number of datagrams."""
    end = time.monotonic() + float(seconds)
    count = 0
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
        sender.connect(("127.0.0.1", int(port)))
        while time.monotonic() < end:
            for datagram in USELESS:
                sender.send(datagram)
            count += len(USELESS)
    print(count)


if __name__ == "__main__":
    main(*sys.argv[1:])
