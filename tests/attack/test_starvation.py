"""However much there is to read of a few enormous files, a real file is registered within seconds."""

from __future__ import annotations

import contextlib
import os
import statistics
import time
from pathlib import Path

import pytest

from socs_monitor.wire.publisher import Publisher
from tests.evidence import entries, latencies, wait_rows
from tests.testbed.processes import Agent, Router
from tests.testbed.smurf_server import SmurfServer

MANY = 300


def make_sparse(path: Path, *sizes: int) -> None:
    """Create a sparse file with the first of these sizes (bytes) that the file system allows."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "wb") as file:
        for size in sizes:
            with contextlib.suppress(OSError):  # too large for this file system
                file.truncate(size)
                return
    raise AssertionError(f"{path.parent} allows no file of {min(sizes)} bytes")


@pytest.mark.alone
@pytest.mark.timeout(180)
def test_enormous_files_and_one_that_is_announced_many_times(no_router: Router, tmp_path: Path) -> None:
    stream = tmp_path / "so" / "timestreams" / "17000" / "crate1slot2"
    enormous = [stream / f"1700000000_{number:03}.g3" for number in range(2)]
    for path in enormous:
        make_sparse(path, 8 << 40, 1 << 40)
    large = tmp_path / "large.npy"
    make_sparse(large, 1 << 30)
    real = stream / "1700000600_000.g3"
    real.write_bytes(os.urandom(20 << 20))
    with (
        Agent(tmp_path / "agent", no_router) as agent,
        SmurfServer(tmp_path / "server", agent.address) as server,
        Publisher("STREAMER:crate1slot2", agent.address) as streamer,
        Publisher("crate1slot2", agent.address) as pysmurf,
    ):
        agent.wait_listening()
        for path in enormous:
            streamer.g3_file(str(path))
        for number in range(MANY):
            pysmurf.data_file(str(large), action=f"action_{number}", action_ts="1700000000")
        agent.wait_for(lambda: len(entries(agent)) >= 2 + MANY, 10, "spooled them")

        begin = time.monotonic()
        streamer.g3_file(str(real))
        wait_rows(agent, [str(real)], 20)
        print(f"a real file of 20 MB: {time.monotonic() - begin:.1f} s")
        small = latencies(agent, server, 20)
        print(f"small files: median {statistics.median(small):.2f} s, at most {max(small):.2f} s")
        assert statistics.median(small) < 1
        assert max(small) < 3

        copies = lambda: sum(row["local_path"] == str(large) for row in agent.rows())  # noqa: E731
        agent.wait_for(lambda: copies() == MANY, 60, "registered the large file for every action")
        print(f"all {MANY} registrations of the file of 1 GiB: {time.monotonic() - begin:.1f} s")
        assert not {str(path) for path in enormous} & {row["local_path"] for row in agent.rows()}

        begin = time.monotonic()
        assert agent.stop() == 0
        print(f"stopped in {time.monotonic() - begin:.1f} s")
        assert time.monotonic() - begin < 6
        agent.start()
        agent.wait_listening()
        again = stream / "1700000600_001.g3"
        again.write_bytes(os.urandom(20 << 20))
        begin = time.monotonic()
        streamer.g3_file(str(again))
        wait_rows(agent, [str(again)], 20)
        print(f"the same after a restart: {time.monotonic() - begin:.1f} s")
        assert agent.stop() == 0
