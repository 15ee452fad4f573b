"""Whatever arrives, the agent's memory is bounded, and the real files in between are registered."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import signal
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from socs_monitor.wire.publisher import MAX_DATAGRAM, data_file
from tests import hostile
from tests.attack import spoolfile
from tests.chain import write_lock
from tests.evidence import acknowledged, entries, send_files, spool_of, wait_rows
from tests.testbed.processes import Agent, Router
from tests.testbed.smurf_server import SmurfServer

# An idle agent has 95 MiB, and 120 MiB were the most in these attacks. Each attack would take at least another 120 MiB
# if all of it were kept, even as bytes.
LIMIT_MIB = 200

# 63 kB of JSON, and 28 times as much as Python objects.
NESTED = [{"": 0}] * 7800


def encode(kind: str, payload: Any, pub_id: str = "crate1slot2") -> bytes:
    envelope = {"host": "h", "id": pub_id, "script": "undeclared", "time": 1_700_000_000.5, "seq_no": 0}
    datagram = json.dumps({**envelope, "type": kind, "payload": payload}, separators=(",", ":")).encode()
    assert 40_000 < len(datagram) < MAX_DATAGRAM
    return datagram


def numbered(datagram: bytes, count: int, first: int = 0) -> Iterator[bytes]:
    """Yield `count` copies of the datagram, each with a number in place of the ``@``."""
    begin, end = datagram.split(b"@")
    return (b"%s%06d%s" % (begin, number, end) for number in range(first, first + count))


def mixed(kinds: Sequence[bytes], count: int) -> Iterator[bytes]:
    """Yield datagrams of each kind in turn, no two with the same number."""
    each = count // len(kinds)
    streams = [numbered(kind, each, first=number * each) for number, kind in enumerate(kinds)]
    return itertools.chain.from_iterable(zip(*streams, strict=True))


def session_data(count: int) -> Iterator[bytes]:
    return numbered(encode("session_data", {"number": "@", "data": NESTED}), count)


def metadata(count: int) -> Iterator[bytes]:
    """Yield lists of one register, and lists, strings and register names of 60 kB, each of another stream."""
    kinds = (
        encode("metadata", {"path": "AMCc.x", "value": ["@", NESTED], "type": "list"}),
        encode("metadata", {"path": "AMCc.x", "value": NESTED, "type": "list"}, "STREAMER:s@"),
        encode("metadata", {"path": "AMCc.x", "value": "x" * 60_000, "type": "str"}, "STREAMER:s@"),
        encode("metadata", {"path": f"AMCc.{'x' * 60_000}", "value": 1, "type": "int"}, "STREAMER:s@"),
    )
    return mixed(kinds, count)


def registration(path: Path, **fields: Any) -> bytes:
    """Return a registration of a file. Its action takes a number, so that no two are the same."""
    payload = data_file(str(path), timestamp=1_700_000_000, action="a@", action_ts="1700000000")
    return encode("data_file", {**payload, **fields})


def registrations(path: Path, count: int) -> Iterator[bytes]:
    """Yield large registrations: with nested extra fields, long extra fields, or an impossible path."""
    kinds = (
        registration(path, extra=NESTED),
        registration(path, extra={"x": NESTED}),
        registration(path, **{f"extra{number}": "x" * 900 for number in range(60)}),
        registration(Path("/" + "x" * 60_000)),
    )
    return mixed(kinds, count)


def memory_mib(agent: Agent, field: str = "VmHWM") -> float:
    """Return the process's resident memory: its peak, or with `VmRSS` the present value."""
    status = Path(f"/proc/{agent.pid}/status").read_text()
    return int(status.partition(f"{field}:")[2].split()[0]) / 1024


def check_memory(agent: Agent, what: str) -> None:
    peak, now = memory_mib(agent), memory_mib(agent, "VmRSS")
    print(f"{what}: at most {peak:.0f} MiB, now {now:.0f} MiB")
    assert peak < LIMIT_MIB, f"{what}: {peak:.0f} MiB"


def attack(agent: Agent, server: SmurfServer, datagrams: Iterator[bytes]) -> list[str]:
    """Send the datagrams, and a real file after every 100; return the paths of these files."""
    real: list[str] = []
    while portion := list(itertools.islice(datagrams, 100)):
        hostile.send(agent.udp_port, portion)
        real += send_files(server, 1)
    hostile.wait_read(agent.udp_port)
    return real


def test_large_messages_without_a_router(no_router: Router, tmp_path: Path) -> None:
    with (
        Agent(tmp_path / "agent", no_router) as agent,
        SmurfServer(tmp_path / "server", agent.address) as server,
    ):
        agent.wait_listening()
        real = attack(agent, server, itertools.chain(session_data(1000), metadata(1000)))
        wait_rows(agent, [*real, *send_files(server, 12)], 15)
        check_memory(agent, "1,000 session_data and 1,000 metadata without a router")
        assert agent.stop() == 0


def test_large_messages_while_the_router_is_stalled(tmp_path: Path) -> None:
    with (
        Router(tmp_path) as router,
        Agent(tmp_path / "agent", router) as agent,
        SmurfServer(tmp_path / "server", agent.address) as server,
    ):
        agent.wait_listening()
        agent.client()
        os.killpg(router.pid, signal.SIGSTOP)
        try:
            real = attack(agent, server, itertools.chain(session_data(1800), metadata(200)))
            wait_rows(agent, [*real, *send_files(server, 12)], 15)
            check_memory(agent, "1,800 session_data and 200 metadata with a stalled router")
        finally:
            os.killpg(router.pid, signal.SIGCONT)
        wait_rows(agent, send_files(server, 12), 15)
        agent.client()
        check_memory(agent, "after the router resumed")
        assert agent.stop() == 0


def test_large_registrations_during_a_lock_and_after_a_kill(no_router: Router, tmp_path: Path) -> None:
    count = 2000
    target = tmp_path / "target.txt"
    target.write_text("target")
    with (
        Agent(tmp_path / "agent", no_router) as agent,
        SmurfServer(tmp_path / "server", agent.address) as server,
    ):
        agent.wait_listening()
        wait_rows(agent, send_files(server, 1))
        with write_lock(agent.db_path):
            real = attack(agent, server, registrations(target, count))
            agent.wait_for(lambda: len(entries(agent)) >= count + len(real), 30, "spooled them all")
            check_memory(agent, f"{count} registrations during a lock")
            agent.kill()

            agent.start()
            agent.wait_listening()
            real += send_files(server, 12)
            agent.wait_for(lambda: acknowledged(agent) >= set(real), 20, "spooled the files")
            check_memory(agent, f"a start on {count} registrations during the lock")
        wait_rows(agent, real, 30)
        expected = 3 * count // 4  # the others have an impossible path
        agent.wait_for(lambda: len(agent.rows()) >= expected, 30, "registered the possible ones")
        check_memory(agent, f"a start on {count} registrations, and after the lock")
        assert agent.stop() == 0
    spool_of(agent).unlink()  # 130 MB, which pytest would keep


def test_a_start_on_a_spool_of_version_1_that_is_full_of_large_registrations(no_router: Router, tmp_path: Path) -> None:
    count = 2000
    target = tmp_path / "target.txt"
    target.write_text("target")
    agent = Agent(tmp_path / "agent", no_router)
    spoolfile.make_version_1(spool_of(agent))
    spoolfile.insert(spool_of(agent), (datagram.decode() for datagram in registrations(target, count)))
    with contextlib.ExitStack() as stack:
        stack.enter_context(agent)
        server = stack.enter_context(SmurfServer(tmp_path / "server", agent.address))
        agent.wait_listening()
        real = send_files(server, 12)
        wait_rows(agent, real, 30)
        expected = 3 * count // 4 + len(real)
        agent.wait_for(lambda: len(agent.rows()) >= expected, 30, "registered the possible ones")
        check_memory(agent, f"a start on {count} registrations of version 1")
        assert agent.stop() == 0
    spool_of(agent).unlink()
