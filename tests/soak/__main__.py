"""`make soak`: a day's load with the published SupRsync on the same database, and random kills of all agents.

The exit code is 0 if every file is registered once, with the right MD5 sum, and archived byte for byte. Messages that
were sent while no agent ran are sent again, as a site would do with `backfill`.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import random
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import yaml

from tests.evidence import acknowledged, check_rows, md5_of, spool_of, spooled
from tests.socs import server_root, suprsync
from tests.testbed.ports import free_udp_port
from tests.testbed.processes import PEER_BIN, Agent, Process, Router, require, rows, wait_until
from tests.testbed.smurf_server import FILE_MIX, Message, SmurfServer

STREAMS = 6
METADATA_RATE = 200  # a second
ARCHIVES = ("smurf", "timestreams")
DELETE_AFTER_S = 20.0
SUPRSYNC_RATE = 10.0  # files that it copies a second, at least
SHOW_EVERY_S = 10.0

# Messages sent less than this many seconds before a kill may not have reached the spool.
GRACE_S = 1.0

_BEGIN = time.monotonic()


def say(text: str) -> None:
    """Print a line of progress with the seconds since the start."""
    print(f"[{time.monotonic() - _BEGIN:6.1f} s] {text}", flush=True)


class SupRsync(Process):
    """The published SupRsync agent for one archive, which copies to a folder on this host."""

    def __init__(self, folder: Path, monitor: Agent, archive: str) -> None:
        self.archive = archive
        self.base = folder / archive
        self.base.mkdir()
        instance = f"suprsync-{archive}"
        options = {
            "--archive-name": archive,
            "--remote-basedir": str(self.base),
            "--db-path": str(monitor.db_path),
            "--suprsync-file-root": str(folder / "suprsync-files"),
            "--delete-local-after": DELETE_AFTER_S,
            "--files-per-batch": 500,
            "--max-copy-attempts": 1000,  # a kill during a copy counts as one
            "--sleep-time": 1,
        }
        config = yaml.safe_load(monitor.site_config.read_text())
        arguments = [list(option) for option in options.items()]
        config["hosts"]["localhost"]["agent-instances"] = [
            {"agent-class": "SupRsync", "instance-id": instance, "arguments": arguments}
        ]
        site_config = folder / f"{instance}.yaml"
        site_config.write_text(yaml.safe_dump(config))
        command = [require(PEER_BIN / "ocs-agent-cli"), "--site-file", site_config, "--instance-id", instance]
        super().__init__(command, folder / f"{instance}.log", cwd=folder)

    def __str__(self) -> str:
        return f"SupRsync for {self.archive}"


class Soak:
    """The load, and its bookkeeping.

    Attributes:
        sums: MD5 sum of each announced file, by the path in its row.
        kills: Number of kills.
        missed: Number of messages that were sent again.
    """

    def __init__(self, monitor: Agent, suprsyncs: Sequence[SupRsync], seed: int) -> None:
        self.monitor = monitor
        self.suprsyncs = suprsyncs
        self.sums: dict[str, str] = {}
        self.kills = 0
        self.missed = 0
        self._random = random.Random(seed)
        self._sent: dict[str, tuple[float, Message]] = {}  # not yet acknowledged: unix time, message
        self._again: list[Message] = []
        self._guard = threading.Lock()
        self._listening = time.time()

    def send(self, server: SmurfServer, files: int, rate: float) -> None:
        """Send `files` files, `rate` a second, with metadata in between, and repeat the messages that were missed."""
        per_file = round(METADATA_RATE / rate * len(FILE_MIX))
        mix = (*FILE_MIX, *["metadata"] * per_file)
        messages = server.messages(files * len(mix) // len(FILE_MIX), mix)
        in_all = rate * len(mix) / len(FILE_MIX)
        begin = time.monotonic()
        for number, message in enumerate(messages):
            if (early := begin + number / in_all - time.monotonic()) > 0:
                time.sleep(early)  # pacing
            if message.file is not None:
                self.sums[message.file] = md5_of(message.file)
            self._publish(message)
            if number % 100 == 0:
                self._publish_again()
        wait_until(self._all_acknowledged, 60, "the agent has accepted all files")

    def _publish(self, message: Message) -> None:
        with self._guard:
            if message.file is not None:
                self._sent[message.file] = (time.time(), message)
            message.publisher.publish(message.payload, message.kind)

    def _publish_again(self) -> None:
        with self._guard:
            again, self._again = self._again, []
        for message in again:
            self._publish(message)

    def _all_acknowledged(self) -> bool:
        self._publish_again()
        have = acknowledged(self.monitor)
        with self._guard:
            return not self._again and all(self._is_among(message, have) for _, message in self._sent.values())

    @staticmethod
    def _is_among(message: Message, paths: set[str]) -> bool:
        return message.file in paths or message.payload["path"] in paths  # the latter may lack .npy

    def kill_until(self, done: Callable[[], bool], every_s: float) -> None:
        """Kill and restart a random process every `every_s` seconds on average, until `done()`."""
        while True:
            due = time.monotonic() + self._random.expovariate(1 / every_s)
            while time.monotonic() < due:
                if done():
                    return
                time.sleep(0.05)  # until a random moment
            victim = self._random.choice([self.monitor, self.monitor, *self.suprsyncs])
            self.kills += 1
            if victim is self.monitor:
                self._kill_monitor()
            else:
                victim.kill()
                victim.start()

    def _kill_monitor(self) -> None:
        self.monitor.kill()
        died = time.time()
        have = acknowledged(self.monitor)
        self.monitor.start()
        self.monitor.wait_listening()
        with self._guard:
            again = {file: message for file, (_, message) in self._sent.items() if not self._is_among(message, have)}
            early = [file for file in again if self._listening < self._sent[file][0] < died - GRACE_S]
            assert not early, (
                f"{len(early)} files sent over {GRACE_S:g} s before the kill are not in the spool: {early[:3]}"
            )
            self._sent = {}
            self._again += again.values()
            self._listening = time.time()
        self.missed += len(again)

    def show_for_ever(self, stop: threading.Event) -> None:
        """Print the progress every `SHOW_EVERY_S` seconds."""
        while not stop.wait(SHOW_EVERY_S):
            registered, archived = self.counts()
            say(
                f"{len(self.sums)} files sent, {registered} registered, {archived} archived; {self.kills} kills,"
                f" {self.missed} sent again"
            )

    def counts(self) -> tuple[int, int]:
        """Return the number of registered and of archived files."""
        found = rows(self.monitor.db_path)
        return len(found), sum(row["local_md5sum"] == row["remote_md5sum"] for row in found)


@contextlib.contextmanager
def meanwhile(work: Callable[[threading.Event], None]) -> Iterator[None]:
    """Run `work` in a thread. At the end of the block its event is set, and what it raised is raised."""
    stop = threading.Event()
    with ThreadPoolExecutor(1) as pool:
        done = pool.submit(work, stop)
        try:
            yield
        finally:
            stop.set()
        done.result()


def soak(folder: Path, root: Path, args: argparse.Namespace) -> None:
    """Run everything in scratch folders.

    Raises:
        AssertionError: If something is wrong.
    """
    udp_port = free_udp_port()
    with contextlib.ExitStack() as stack:
        router = stack.enter_context(Router(folder))
        monitor = stack.enter_context(Agent(folder / "agent", router, udp_port=udp_port))
        monitor.wait_listening()
        suprsyncs = [stack.enter_context(SupRsync(folder, monitor, archive)) for archive in ARCHIVES]
        load = Soak(monitor, suprsyncs, args.seed)
        server = stack.enter_context(
            SmurfServer(root, monitor.address, streams=STREAMS, sizes={"g3": 16384}, smurf_data="")
        )
        with meanwhile(load.show_for_ever):
            # started in this thread, since the kernel kills a process together with the thread that started it
            with ThreadPoolExecutor(1) as pool:
                sent = pool.submit(load.send, server, args.files, args.rate)
                load.kill_until(sent.done, args.kill_every)
                sent.result()
            say("all files are sent; waiting for SupRsync")
            deadline_s = 120 + len(load.sums) / SUPRSYNC_RATE
            wait_until(lambda: load.counts() == (len(load.sums),) * 2, deadline_s, "all files are archived")
        assert monitor.stop() == 0
        for process in suprsyncs:
            process.kill()
    check(monitor, suprsyncs, load)


def check(monitor: Agent, suprsyncs: Sequence[SupRsync], load: Soak) -> None:
    """Check the rows, the spool and the archive."""
    say("checking every file")
    check_rows(rows(monitor.db_path), load.sums)
    # files of the last seconds, which have rows and still have to be re-checked
    left = spooled(spool_of(monitor))
    lost = {path.removesuffix(".npy") for path in left} - {path.removesuffix(".npy") for path in load.sums}
    assert not lost, f"in the spool only: {sorted(lost)[:3]}"
    assert set(left.values()) <= {"pending", "waiting", "registered"}, Counter(left.values())
    for row in rows(monitor.db_path):
        base = next(process.base for process in suprsyncs if process.archive == row["archive_name"])
        content = (base / row["remote_path"]).read_bytes()
        assert hashlib.md5(content).hexdigest() == load.sums[row["local_path"]], f"{row} differs in the archive"
        assert row["removed"] is not None or Path(row["local_path"]).exists()
    for process in suprsyncs:
        after = suprsync(monitor.db_path, process.archive, process.base).after
        assert after["uncopied_files"] == 0
        assert abs(after["finalized_until"] - time.time()) < 60


def main() -> int:
    """Run the command, and return its exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description=__doc__)
    parser.add_argument("--files", type=int, default=30_000, help="default: %(default)s")
    parser.add_argument("--rate", type=float, default=100.0, help="files a second; default: %(default)s")
    parser.add_argument("--kill-every", type=float, default=10.0, help="seconds on average; default: %(default)s")
    parser.add_argument("--seed", type=int, default=random.randrange(1 << 32), help="of the kills; default: random")
    args = parser.parse_args()
    say(f"{args.files} files, {args.rate:g} a second, seed {args.seed}")
    with tempfile.TemporaryDirectory(prefix="socs-monitor-soak-") as folder, server_root() as root:
        try:
            soak(Path(folder), root, args)
        except AssertionError as error:
            say(f"FAILED: {error}")
            return 1
    say("every file is registered once and archived byte for byte")
    return 0


if __name__ == "__main__":
    sys.exit(main())
