"""Anybody can write any sequence number: what nobody can have lost raises no alarm."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from tests import hostile
from tests.integration.test_end_to_end import data
from tests.testbed.processes import Agent

StartAgent = Callable[..., Agent]


def start(id_: str, number: int) -> bytes:
    envelope: dict[str, Any] = {"id": id_, "script": "s", "time": number, "seq_no": number, "type": "start"}
    return json.dumps({**envelope, "payload": {}}).encode()


def test_a_large_jump_is_another_sequence_and_no_loss(agent: StartAgent) -> None:
    monitor = agent()
    client = monitor.client()
    hostile.send(monitor.udp_port, [start("forged", 0), start("forged", 500_000), start("forged", 510_002)])
    hostile.send(monitor.udp_port, [start("real", 0), start("real", 2)])  # of one socket, but another sequence
    monitor.wait_for(lambda: data(client)["lost"]["gaps"], 10, "counted what is missing")

    assert data(client)["lost"]["gaps"] == 1
    assert [sender["id"] for sender in data(client)["lost"]["senders"]] == ["real"]
