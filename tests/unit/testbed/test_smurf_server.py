"""The simulated SMuRF server writes the files of a real one, and announces each of them."""

from __future__ import annotations

import ast
import re
import time
from collections import Counter
from pathlib import Path

from tests.testbed.smurf_server import FULL_MIX, REGISTERS, SIZES, SmurfServer
from tests.unit.conftest import Listener


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
    sizes = SIZES | {"g3": 3_000_000}

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
