"""A mount that hangs delays only its own files, and only while it hangs.

A blocked access ends with SIGKILL only, as on a hard-mounted NFS. SIGTERM has to stop the agent all the same.
"""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from socs_monitor.wire.publisher import Publisher
from tests.evidence import entries, latencies, path_of, send_files, wait_rows
from tests.hung import HungFolder, hung_folder
from tests.integration.test_end_to_end import data
from tests.testbed.processes import Agent, Router
from tests.testbed.smurf_server import SmurfServer

HANGS = "reading the file hangs"

# Seconds that the agent may take to notice (10 s for each worker), and to stop although an access hangs.
NOTICE_S = 30
END_S = 6


@pytest.fixture
def mount(tmp_path: Path) -> Iterator[HungFolder]:
    """Mount a hung file system at ``<tmp_path>/data/hung``."""
    with hung_folder(tmp_path / "data" / "hung") as folder:
        yield folder


@contextlib.contextmanager
def started(folder: Path, router: Router, *roots: Path) -> Iterator[tuple[Agent, SmurfServer]]:
    """Start an agent with these data roots, and a sender that writes to the last one. The agent is killed after use."""
    agent = Agent(folder / "agent", router, options=[["--data-root", *map(str, roots)]])
    roots[-1].mkdir(exist_ok=True)
    with contextlib.ExitStack() as stack:
        stack.callback(agent.kill)
        agent.start()
        server = stack.enter_context(SmurfServer(roots[-1] / "server", agent.address))
        agent.wait_listening()
        yield agent, server


def announce(agent: Agent, *paths: str | Path) -> list[str]:
    with contextlib.closing(Publisher("STREAMER:crate1slot2", agent.address)) as streamer:
        for path in paths:
            streamer.g3_file(str(path))
    return [str(path) for path in paths]


def fates(agent: Agent) -> dict[str, tuple[str, str]]:
    """Return state and reason of each path in the spool."""
    return {path_of(entry["message"]): (entry["state"], entry["reason"] or "") for entry in entries(agent)}


def hanging(agent: Agent, paths: list[str]) -> bool:
    """Return whether every registration waits because its file hangs."""
    found = fates(agent)
    return all(path in found and found[path][0] == "waiting" and HANGS in found[path][1] for path in paths)


def wait_hanging(agent: Agent, paths: list[str]) -> None:
    agent.wait_for(lambda: hanging(agent, paths), NOTICE_S, f"reported that {len(paths)} files hang")


def latencies_until(agent: Agent, server: SmurfServer, condition: Callable[[], bool], deadline_s: float) -> list[float]:
    """Register one small file after the other until the condition is true; return the seconds that each took."""
    taken: list[float] = []
    deadline = time.monotonic() + deadline_s
    while not condition():
        assert time.monotonic() < deadline, f"timed out after {deadline_s:g} s; the log ends:\n{agent.log[-4000:]}"
        taken += latencies(agent, server, 1)
    return taken


def stop(agent: Agent) -> None:
    """Stop the agent with SIGTERM, which must not wait for the mount."""
    begin = time.monotonic()
    code = agent.stop()
    taken = time.monotonic() - begin
    print(f"stopped in {taken:.1f} s, exit code {code}")
    assert taken < END_S
    assert code is not None
    assert code >= 0, "must end by itself"


def check_quick(taken: list[float], what: str) -> None:
    print(f"{what}: median {statistics.median(taken):.2f} s, at most {max(taken):.2f} s")
    assert statistics.median(taken) < 1
    assert max(taken) < 5


def test_one_file_on_a_hung_mount_holds_up_no_other(mount: HungFolder, no_router: Router, tmp_path: Path) -> None:
    with started(tmp_path, no_router, tmp_path / "data") as (agent, server):
        (hung,) = announce(agent, mount.path / "17000" / "crate1slot2" / "1700000000_000.g3")
        begin = time.monotonic()
        wait_rows(agent, send_files(server, 20), 5)
        print(f"20 files elsewhere: {time.monotonic() - begin:.2f} s")
        check_quick(latencies(agent, server, 10), "while the first hangs")
        check_quick(latencies_until(agent, server, lambda: hanging(agent, [hung]), NOTICE_S), "until it is abandoned")
        check_quick(latencies(agent, server, 10), "after it was abandoned")
        stop(agent)

        agent.start()
        agent.wait_listening()
        begin = time.monotonic()
        wait_rows(agent, send_files(server, 20), 5)
        print(f"20 files elsewhere after a restart: {time.monotonic() - begin:.2f} s")
        stop(agent)


def test_a_data_root_that_is_a_hung_mount(mount: HungFolder, no_router: Router, tmp_path: Path) -> None:
    """It hangs before the agent starts."""
    with started(tmp_path, no_router, mount.path, tmp_path / "other") as (agent, server):
        announce(agent, mount.path / "17000" / "crate1slot2" / "1700000000_000.g3")
        wait_rows(agent, send_files(server, 20), 5)
        check_quick(latencies(agent, server, 10), "while it hangs")
        stop(agent)


def test_a_mount_that_hangs_while_a_large_file_is_read(mount: HungFolder, no_router: Router, tmp_path: Path) -> None:
    name = "17000/crate1slot2/1700000000_000.g3"
    contents = {name: bytes(32 << 20)}
    mount.recover(contents, hang_at=8 << 20)
    with started(tmp_path, no_router, tmp_path / "data") as (agent, server):
        (hung,) = announce(agent, mount.path / name)
        mount.wait_hung()
        wait_rows(agent, send_files(server, 20), 5)
        large = tmp_path / "data" / "large.g3"
        large.write_bytes(bytes(20 << 20))
        wait_rows(agent, announce(agent, large), 10)
        check_quick(latencies_until(agent, server, lambda: hanging(agent, [hung]), NOTICE_S), "until it is abandoned")
        stop(agent)


def test_sigterm_while_the_first_access_hangs(mount: HungFolder, no_router: Router, tmp_path: Path) -> None:
    with started(tmp_path, no_router, tmp_path / "data") as (agent, _):
        (hung,) = announce(agent, mount.path / "17000" / "crate1slot2" / "1700000000_000.g3")
        agent.wait_for(lambda: hung in fates(agent), 5, "spooled it")
        stop(agent)
        assert fates(agent).keys() == {hung}


def test_a_hung_mount_outside_the_data_roots_is_refused_without_access(
    mount: HungFolder, no_router: Router, tmp_path: Path
) -> None:
    """Any access would hang, so the path alone must suffice."""
    with started(tmp_path, no_router, tmp_path / "root") as (agent, server):
        outside = announce(
            agent,
            *(mount.path / "17000" / "crate1slot2" / f"1700000000_{number:03}.g3" for number in range(12)),
            f"{tmp_path}/root/../data/hung/17000/crate1slot2/1700000000_000.g3",
        )
        wait_rows(agent, send_files(server, 20), 5)

        def refused() -> bool:
            found = fates(agent)
            return all(path in found and found[path][0] == "dead" for path in outside)

        agent.wait_for(refused, 5, "refused all")
        found = fates(agent)
        assert {"outside of the data roots" in found[path][1] for path in outside} == {True}
        assert HANGS not in agent.log
        stop(agent)


@pytest.mark.alone
@pytest.mark.timeout(300)
def test_hung_files_in_many_folders_until_the_mount_recovers(mount: HungFolder, router: Router, tmp_path: Path) -> None:
    names = [f"{number}/crate1slot2/{1_700_000_000 + number}_000.g3" for number in range(10)]
    for number in range(10):
        (tmp_path / "data" / f"folder_{number}").symlink_to(mount.path / str(number))
    with started(tmp_path, router, tmp_path / "data", tmp_path / "other") as (agent, server):
        client = agent.client()
        hung = announce(agent, *(tmp_path / "data" / f"folder_{name}" for name in names))
        degraded = lambda: data(client)["degraded"]  # noqa: E731
        taken = latencies_until(
            agent, server, lambda: hanging(agent, hung) and "disk_hangs" in degraded(), 2 * NOTICE_S
        )
        check_quick(taken, f"{len(taken)} files meanwhile")
        assert str(tmp_path / "data") in str(degraded()["disk_hangs"])
        check_quick(latencies(agent, server, 10), "after the root was abandoned")
        stop(agent)

        agent.start()
        agent.wait_listening()
        begin = time.monotonic()
        wait_rows(agent, send_files(server, 20), 5)
        print(f"20 files elsewhere after a restart: {time.monotonic() - begin:.2f} s")
        wait_hanging(agent, hung)

        mount.recover({name: name.encode() for name in names})
        begin = time.monotonic()
        wait_rows(agent, hung, 90)
        print(f"{len(hung)} files of the mount, after it recovered: {time.monotonic() - begin:.1f} s")
        client = agent.client()
        agent.wait_for(lambda: data(client)["degraded"] == {}, 90, "recovered")
        stop(agent)


def test_a_mount_that_goes_away_while_it_hangs(mount: HungFolder, no_router: Router, tmp_path: Path) -> None:
    """Blocked accesses fail, and the file is retried."""
    with started(tmp_path, no_router, tmp_path / "data") as (agent, server):
        (hung,) = announce(agent, mount.path / "17000" / "crate1slot2" / "1700000000_000.g3")
        wait_rows(agent, send_files(server, 20), 5)
        mount.fail(5)
        agent.wait_for(lambda: fates(agent)[hung][0] == "waiting", 15, "retries it")
        check_quick(latencies(agent, server, 10), "afterwards")
        stop(agent)
