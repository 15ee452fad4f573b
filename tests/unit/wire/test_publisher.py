"""The publisher sends the same bytes as the real senders."""

from __future__ import annotations

import json
import socket
import time

import pytest

from socs_monitor.wire.publisher import MAX_DATAGRAM, Publisher
from tests.unit.conftest import Listener


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
        a.publish({"message": "x"}, "log")
        b.g3_file("/data/so/timestreams/17000/s/1_000.g3")
        a.metadata("AMCc.enable", True)
        a.session_data({"k": 1})
        a.session_log("line")
        a.publish({"message": "oh"}, "backend_error")
        a.publish([1])

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
    publisher.publish("x" * room)
    publisher.publish("x" * (room + 1))
    fits = listener.raw()
    error = json.loads(listener.raw())
    publisher.close()

    assert len(fits) == MAX_DATAGRAM
    assert (error["type"], error["seq_no"]) == ("backend_error", 3)
    assert f"{MAX_DATAGRAM + 1} bytes" in error["payload"]["message"]


def test_ipv6() -> None:
    listener = Listener("::1")
    publisher = Publisher("a", listener.address)
    publisher.publish({"message": "six"}, "log")
    assert listener.receive(1)[0]["payload"] == {"message": "six"}
    publisher.close()
    listener.socket.close()
