"""The emulator sends the real publishers' bytes and writes the real server's files."""

from __future__ import annotations

import ast
import json
import re
import socket
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from socs_monitor import emulator
from socs_monitor.emulator import FULL_MIX, MAX_DATAGRAM, REGISTERS, Publisher, SmurfServer


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


def test_a_datagram_is_the_publishers_json_byte_for_byte(listener: Listener) -> None:
    publisher = Publisher("crate1slot2", listener.address)
    publisher.data_file("/data/x.npy", file_type="tuning", file_format="npy", timestamp=1.5, action="t", action_ts="9")
    raw = listener.raw()
    publisher.close()

    envelope = json.loads(raw)
    assert list(envelope) == ["host", "id", "script", "time", "seq_no", "type", "payload"]
    assert raw == json.dumps(envelope).encode()
    assert abs(envelope["time"] - time.time()) < 60
    del envelope["time"], envelope["payload"]["pysmurf_version"]
    assert envelope == {
        "host": socket.gethostname(),
        "id": "crate1slot2",
        "script": "undeclared",
        "seq_no": 0,
        "type": "data_file",
        "payload": {
            "path": "/data/x.npy",
            "type": "tuning",
            "format": "npy",
            "timestamp": 1.5,
            "action": "t",
            "action_ts": "9",
            "plot": False,
        },
    }


def test_every_message_spends_a_number_of_its_own_publisher(listener: Listener) -> None:
    with Publisher("a", listener.address) as a, Publisher("b", listener.address) as b:
        a.log("x")
        b.g3_file("/data/so/timestreams/17000/s/1_000.g3")
        a.metadata("AMCc.enable", True)
        a.session_data({"k": 1})
        a.session_log("line")
        a.backend_error("oh")
        a.general([1])

    assert [(m["id"], m["seq_no"], m["type"], m["payload"]) for m in listener.receive(11)] == [
        ("a", 0, "start", {}),
        ("b", 0, "start", {}),
        ("a", 1, "log", {"message": "x"}),
        ("b", 1, "g3_file", {"path": "/data/so/timestreams/17000/s/1_000.g3", "archive_name": "timestreams"}),
        ("a", 2, "metadata", {"path": "AMCc.enable", "value": True, "type": "bool"}),
        ("a", 3, "session_data", {"k": 1}),
        ("a", 4, "session_log", "line"),
        ("a", 5, "backend_error", {"message": "oh"}),
        ("a", 6, "general", [1]),
        ("b", 2, "stop", {}),
        ("a", 7, "stop", {}),
    ]


def test_what_is_too_large_is_dropped_and_announced(listener: Listener, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "time", lambda: 1.5)  # whose digits would else change the size
    publisher = Publisher("a", listener.address)
    room = MAX_DATAGRAM - len(publisher.encode("", "general"))
    publisher.general("x" * room)
    publisher.general("x" * (room + 1))
    fits = listener.raw()
    error = json.loads(listener.raw())
    publisher.close()

    assert len(fits) == MAX_DATAGRAM
    assert (error["type"], error["seq_no"]) == ("backend_error", 3)
    assert f"{MAX_DATAGRAM + 1} bytes" in error["payload"]["message"]


def test_ipv6() -> None:
    listener = Listener("::1")
    publisher = Publisher("a", listener.address)
    publisher.log("six")
    assert listener.receive(1)[0]["payload"] == {"message": "six"}
    publisher.close()
    listener.socket.close()


def test_files_lie_where_a_smurf_server_has_them(listener: Listener, tmp_path: Path) -> None:
    with SmurfServer(tmp_path, listener.address, streams=2, sizes={"g3": 3_000_000}) as server:
        listener.receive(4)
        sent = server.send(server.messages(10, ("npy", "png", "txt", "tune", "g3")))
        arrived = listener.receive(10)
    ctime = r"1\d{9}"
    layout = {
        "npy": rf"smurf_data/20\d{{6}}/ufm_emu\d/{ctime}/outputs/{ctime}_\w+\.npy",
        "png": rf"smurf_data/20\d{{6}}/ufm_emu\d/{ctime}/plots/{ctime}_\w+\.png",
        "txt": rf"smurf_data/20\d{{6}}/ufm_emu\d/{ctime}/outputs/{ctime}_\w+\.txt",
        "tune": rf"smurf_data/tune/{ctime}_tune\.npy",
        "g3": rf"so/timestreams/1\d{{4}}/ufm_emu\d/{ctime}_000\.g3",
    }
    sizes = emulator.SIZES | {"g3": 3_000_000}

    assert [m["payload"] for m in arrived] == [message.payload for message in sent]
    kinds = [kind for kind in layout for _ in range(2)]
    for kind, message in zip(kinds, sent, strict=True):
        assert message.file is not None
        assert re.fullmatch(layout[kind], str(Path(message.file).relative_to(tmp_path)))
        assert Path(message.file).stat().st_size == sizes[kind]
        assert message.payload.get("plot", False) is (kind == "png")
    assert len({Path(message.file).read_bytes() for message in sent if message.file}) == 10
    # one of the two streams leaves out what numpy.save appends
    assert [message.payload["path"].endswith(".npy") for message in sent[:2]] == [True, False]
    assert [m["id"] for m in arrived[-2:]] == ["STREAMER:ufm_emu2", "STREAMER:ufm_emu3"]
    assert {m["id"] for m in arrived[:-2]} == {"crate1slot2", "crate1slot3"}


def test_npy_files_have_numpys_byte_format(listener: Listener, tmp_path: Path) -> None:
    with SmurfServer(tmp_path, listener.address, streams=1, sizes={"npy": 1000}) as server:
        (message,) = server.messages(1, ("npy",))
    assert message.file is not None
    content = Path(message.file).read_bytes()

    assert content[:8] == b"\x93NUMPY\x01\x00"
    header_length = int.from_bytes(content[8:10], "little")
    assert (10 + header_length) % 64 == 0
    assert content[9 + header_length] == ord("\n")
    header = ast.literal_eval(content[10 : 10 + header_length].decode())
    assert header == {"descr": "|u1", "fortran_order": False, "shape": (len(content) - 10 - header_length,)}


def test_paths_can_be_those_that_the_monitors_container_sees(listener: Listener, tmp_path: Path) -> None:
    server = SmurfServer(tmp_path, listener.address, streams=1, seen_as="/data")
    (message,) = server.messages(1, ("txt",))
    server.__exit__()

    assert message.file is not None
    assert message.payload["path"] == message.file
    assert (tmp_path / Path(message.file).relative_to("/data")).is_file()


def test_every_stream_reports_every_register_by_its_streamer(listener: Listener, tmp_path: Path) -> None:
    with SmurfServer(tmp_path, listener.address, streams=6) as server:
        listener.receive(12)
        server.send(server.messages(6 * len(REGISTERS), ("metadata",)))
        arrived = listener.receive(6 * len(REGISTERS))

    assert len(REGISTERS) == 31
    assert "AMCc.SmurfProcessor.SOStream.open_g3stream" in REGISTERS
    assert {type(value) for value in REGISTERS.values()} == {str, int, float, bool}
    expected = {(f"STREAMER:ufm_emu{slot}", path) for slot in range(2, 8) for path in REGISTERS}
    assert {(m["id"], m["payload"]["path"]) for m in arrived} == expected
    for payload in (m["payload"] for m in arrived):
        assert type(payload["value"]).__name__ == payload["type"] == type(REGISTERS[payload["path"]]).__name__


def test_the_mix_is_kept_and_a_burst_loses_nothing(listener: Listener, tmp_path: Path) -> None:
    mix = (*FULL_MIX, "metadata")
    with SmurfServer(tmp_path, listener.address) as server:
        listener.receive(6)
        datagrams = server.encode(server.messages(3 * len(mix) * 2, mix))
        server.burst(datagrams)
        arrived = listener.receive(len(datagrams))

    assert Counter(m["type"] for m in arrived) == {
        "data_file": 3 * 4 * 2,
        "g3_file": 3 * 2,
        "session_log": 3 * 2,
        "session_data": 3 * 2,
        "metadata": 3 * 2 * 2,
    }
    for publisher in {m["id"] for m in arrived}:
        numbers = [m["seq_no"] for m in arrived if m["id"] == publisher]
        assert numbers == list(range(1, 1 + len(numbers)))


def test_a_rate_is_kept(listener: Listener, tmp_path: Path) -> None:
    with SmurfServer(tmp_path, listener.address) as server:
        begin = time.monotonic()
        server.send(server.messages(21, ("session_log",)), rate=100)
        assert time.monotonic() - begin >= 0.2
