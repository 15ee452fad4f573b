"""Real processes for tests, demo and `make run`: the router, the agent, and what is needed to watch them.

Everything here is a context manager that takes its folder and its port, waits for conditions and not for time, and
leaves nothing running: on leaving the context, and by the kernel's hand if the whole test run is killed.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import time
import unittest
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, Self, TypeVar

import yaml
from ocs.ocs_client import OCSClient

ROOT = Path(__file__).resolve().parents[2]
ENVS = ROOT / ".envs"
CROSSBAR = ENVS / "crossbar" / "bin" / "crossbar"
# The environment of the published socs, with the peer agent and SupRsync; and ours, the one that runs the tests.
PEER_BIN = ENVS / "socs" / "bin"
OWN_BIN = Path(sys.executable).parent
SITE_CONFIG = ROOT / "site-config.example.yaml"
REALM = "test_realm"
DOCUMENTED = ("--udp-port", "--create-table", "--db-path", "--echo-sql", "--test-mode")

T = TypeVar("T")

# The kernel kills the process when its parent (to be exact: the thread that started it) dies: even a test run that is
# killed leaves nothing behind.
_WITH_PARENT = """
import ctypes, os, signal, sys
ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
if os.getppid() == int(sys.argv[1]):
    os.execv(sys.argv[2], sys.argv[2:])
"""


def require(tool: str | Path) -> Path:
    """Return the path of a program that a test needs; see `unavailable` for what happens without it."""
    found = shutil.which(tool)
    if found is None:
        reason = f"{tool} is not installed"
        if ENVS in Path(tool).parents:
            reason += ": `make test` installs it"
        unavailable(reason)
    return Path(found)


def unavailable(reason: str, *, even_in_ci: bool = False) -> NoReturn:
    """Skip the test because this machine lacks something; with CI=true it fails, unless CI may lack it, too.

    Raises:
        unittest.SkipTest: Which pytest understands, and which needs no pytest outside of tests.
        AssertionError: In CI.
    """
    if os.environ.get("CI") == "true" and not even_in_ci:
        raise AssertionError(reason)
    raise unittest.SkipTest(reason)


def wait_until(condition: Callable[[], T], deadline_s: float, what: str) -> T:
    """Wait until `condition()` is true and return what it returned; after `deadline_s` seconds it is a failure."""
    deadline = time.monotonic() + deadline_s
    while not (result := condition()):
        if time.monotonic() > deadline:
            raise AssertionError(f"waited {deadline_s:g} s in vain until {what}")
        time.sleep(0.02)
    return result


def free_port(kind: socket.SocketKind) -> int:
    """A free port of the loopback that stays so: the kernel gives none of this range to a sender by itself."""
    while True:
        port = random.randrange(15_000, 32_000)
        with socket.socket(socket.AF_INET, kind) as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def free_tcp_port() -> int:
    """A free TCP port of the loopback."""
    return free_port(socket.SOCK_STREAM)


def free_udp_port() -> int:
    """A free UDP port of the loopback."""
    return free_port(socket.SOCK_DGRAM)


def udp_port_is_open(port: int) -> bool:
    """Whether somebody on this host has bound the UDP port."""
    for table in ("/proc/net/udp", "/proc/net/udp6"):
        with contextlib.suppress(FileNotFoundError), open(table) as lines:
            if any(line.split()[1].endswith(f":{port:04X}") for line in lines if ":" in line.split()[1]):
                return True
    return False


def rows(db_path: str | Path, table: str = "supersync_v0") -> list[dict[str, Any]]:
    """All rows of a table as dicts, in the order of their ids; none if database or table do not exist yet."""
    if not os.path.exists(db_path):
        return []
    with contextlib.closing(sqlite3.connect(f"file:{db_path}?mode=ro", uri=True, timeout=10)) as connection:
        connection.row_factory = sqlite3.Row
        if not connection.execute("SELECT 1 FROM sqlite_master WHERE name = ?", (table,)).fetchone():
            return []
        return [dict(row) for row in connection.execute(f"SELECT * FROM {table} ORDER BY id")]


class Process:
    """A child process with its output in a file.

    Args:
        command: Program (its full path) and arguments.
        log_path: File that standard output and error are appended to.
        env: Environment variables to add to ours.
        cwd: Working directory.
    """

    def __init__(
        self, command: Sequence[str | Path], log_path: Path, env: Mapping[str, str] | None = None, cwd: Path = ROOT
    ) -> None:
        self.command = [str(part) for part in command]
        self.log_path = log_path
        self._env = {**os.environ, "PYTHONUNBUFFERED": "1", **(env or {})}
        self._cwd = cwd
        self._log_begin = 0  # offset of the latest start, bytes
        self._read_to = 0  # offset that `new_lines` has come to, bytes
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            self.kill()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self.stop()
        finally:
            self.kill()

    @property
    def pid(self) -> int:
        """Process id of the running process."""
        assert self._process is not None, "not started"
        return self._process.pid

    @property
    def exit_code(self) -> int | None:
        """Exit code of the process, negative for a signal; None while it runs."""
        assert self._process is not None, "not started"
        return self._process.poll()

    @property
    def log(self) -> str:
        """What the process has printed since its (latest) start."""
        with open(self.log_path, "rb") as log:
            log.seek(self._log_begin)
            return log.read().decode(errors="replace")

    def new_lines(self) -> list[str]:
        """The complete lines that the process has printed since the last call."""
        with open(self.log_path, "rb") as log:
            log.seek(self._read_to)
            *lines, rest = log.read().split(b"\n")
            self._read_to = log.tell() - len(rest)
        return [line.decode(errors="replace") for line in lines]

    def start(self) -> None:
        """Start the process; it may have run before."""
        assert self._process is None or self.exit_code is not None, "still running"
        with_parent = [sys.executable, "-ISc", _WITH_PARENT, str(os.getpid())]
        with open(self.log_path, "ab") as log:
            self._log_begin = log.tell()
            if self._process is None:
                self._read_to = self._log_begin
            self._process = subprocess.Popen(
                [*with_parent, *self.command],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=self._env,
                cwd=self._cwd,
                process_group=0,  # a Ctrl-C is for us; and its children go with it
            )

    def stop(self, deadline_s: float = 15) -> int | None:
        """Ask the process to end (SIGTERM) and return its exit code; one that does not end is a failure."""
        if self._process is None:
            return None
        if self._process.poll() is None:
            self._process.terminate()
        try:
            return self._process.wait(deadline_s)
        except subprocess.TimeoutExpired:
            self.kill()
            raise AssertionError(
                f"{self} still ran {deadline_s:g} s after SIGTERM; its log ends:\n{self._tail()}"
            ) from None

    def kill(self) -> None:
        """End the process and its children at once (SIGKILL)."""
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()

    def wait(self, deadline_s: float = 30) -> int:
        """Wait for the process to end by itself and return its exit code."""
        wait_until(lambda: self.exit_code is not None, deadline_s, f"{self} ends")
        assert self.exit_code is not None
        return self.exit_code

    def wait_log(self, pattern: str, deadline_s: float = 30) -> re.Match[str]:
        """Wait for a line of the log that `pattern` is found in."""
        return self.wait_for(lambda: re.search(pattern, self.log, re.MULTILINE), deadline_s, f"logged {pattern!r}")

    def wait_for(self, condition: Callable[[], T], deadline_s: float, what: str) -> T:
        """As `wait_until`, but it is a failure at once if the process ends; failures show the end of the log."""

        def alive_and() -> T:
            ended = self.exit_code is not None  # asked first: what it did last counts
            result = condition()
            if ended and not result:
                raise AssertionError(f"{self} ended with {self.exit_code}")
            return result

        try:
            return wait_until(alive_and, deadline_s, f"{self} {what}")
        except AssertionError as error:
            raise AssertionError(f"{error}; its log ends:\n{self._tail()}") from None

    def _tail(self) -> str:
        return self.log[-4000:]

    def __str__(self) -> str:
        return type(self).__name__.lower()


class Router(Process):
    """A real crossbar on the loopback. Started, it is ready; started again, it has the same port.

    Args:
        folder: Scratch folder for its node directory.
        port: TCP port; default is a free one.
    """

    def __init__(self, folder: Path, port: int | None = None) -> None:
        self.port = free_tcp_port() if port is None else port
        node = folder / "crossbar"
        node.mkdir(parents=True, exist_ok=True)
        config = json.loads((ROOT / "tests" / "crossbar" / "config.json").read_text())
        config["workers"][0]["transports"][0]["endpoint"]["port"] = self.port
        (node / "config.json").write_text(json.dumps(config))
        command = [require(CROSSBAR), "start", "--cbdir", node, "--color", "false"]
        super().__init__(command, folder / "router.log")

    @property
    def ws_url(self) -> str:
        """Where agents connect."""
        return f"ws://127.0.0.1:{self.port}/ws"

    @property
    def http_url(self) -> str:
        """Where clients call."""
        return f"http://127.0.0.1:{self.port}/call"

    def start(self) -> None:
        """Start the router and wait until it answers."""
        super().start()
        self.wait_for(self._answers, 60, "answered")

    def _answers(self) -> bool:
        # OCS agents log an error when the realm is not there yet, so ask for a call and not only for a page
        body = json.dumps({"procedure": "wamp.session.count"}).encode()
        call = urllib.request.Request(self.http_url, body, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(call, timeout=5) as reply:
                return reply.status == 200
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            return False


def write_site_config(
    path: Path,
    router: Router,
    udp_port: int,
    db_path: Path,
    options: Sequence[Sequence[Any]] = (),
    published: bool = False,
    instance_id: str | None = None,
) -> None:
    """Write the example site config with another router, port and database.

    Args:
        path: File to write.
        router: The router for the hub.
        udp_port: For ``--udp-port``.
        db_path: For ``--db-path``.
        options: Further options of the agent, as a site config has them: ``[["--create-table", False]]``.
        published: Leave out the options that the published agent does not know.
        instance_id: Of the agent; default is the example's.
    """
    config = yaml.safe_load(SITE_CONFIG.read_text())
    config["hub"] |= {"wamp_server": router.ws_url, "wamp_http": router.http_url}
    instance = config["hosts"]["localhost"]["agent-instances"][0]
    # files lie in scratch folders, which may be anywhere
    ours = [["--data-root", "/"], ["--udp-port", udp_port], ["--db-path", str(db_path)], *options]
    merged = {option[0]: [*option] for option in [*instance["arguments"], *ours]}
    instance["instance-id"] = instance_id or instance["instance-id"]
    instance["arguments"] = [option for option in merged.values() if not published or option[0] in DOCUMENTED]
    path.write_text(yaml.safe_dump(config))


class Agent(Process):
    """The real agent, as a site starts it: `ocs-agent-cli --instance-id pysmurf-monitor` out of a site config.

    Args:
        folder: Scratch folder for site config, log and (by default) the database.
        router: The router that it is to connect to; it need not run.
        udp_port: Its UDP port; default is a free one.
        db_path: The database; default is ``suprsync.db`` in `folder`.
        options: Further options of the agent, as for `write_site_config`.
        arguments: More command line arguments; OCS takes only its own there, e.g. ``--crossbar-timeout``.
        env: Environment variables to add.
        bin_dir: Programs of the environment to take `ocs-agent-cli` from: ours, or `PEER_BIN`.
        instance: Its instance-id, where there are several on a router.
    """

    INSTANCE = "pysmurf-monitor"

    def __init__(
        self,
        folder: Path,
        router: Router,
        *,
        udp_port: int | None = None,
        db_path: Path | None = None,
        options: Sequence[Sequence[Any]] = (),
        arguments: Sequence[str] = (),
        env: Mapping[str, str] | None = None,
        bin_dir: Path = OWN_BIN,
        instance: str = INSTANCE,
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.INSTANCE = instance
        self.udp_port = free_udp_port() if udp_port is None else udp_port
        self.db_path = folder / "suprsync.db" if db_path is None else db_path
        self.site_config = folder / "site-config.yaml"
        write_site_config(self.site_config, router, self.udp_port, self.db_path, options, bin_dir == PEER_BIN, instance)
        command = [require(bin_dir / "ocs-agent-cli")]
        coverage = sys.modules.get("coverage")
        if bin_dir == OWN_BIN and coverage is not None and coverage.Coverage.current() is not None:
            # the test run measures coverage: the agent adds its own, in a file beside that of the tests
            rcfile = ROOT / "pyproject.toml"
            command = [OWN_BIN / "python", "-m", "coverage", "run", f"--rcfile={rcfile}", "-m", "ocs.agent_cli"]
            env = {"COVERAGE_FILE": str(ROOT / ".coverage"), **(env or {})}
        command += ["--site-file", self.site_config, "--instance-id", self.INSTANCE, *arguments]
        super().__init__(command, folder / "agent.log", env, folder)

    @property
    def address(self) -> tuple[str, int]:
        """Where its senders send to."""
        return "127.0.0.1", self.udp_port

    def wait_listening(self, deadline_s: float = 30) -> None:
        """Wait until the UDP port is open: whatever is sent from now on, the agent gets."""
        self.wait_for(lambda: udp_port_is_open(self.udp_port), deadline_s, "opened its UDP port")

    def client(self, deadline_s: float = 30) -> OCSClient:
        """A real client of the agent, as soon as the agent answers the router's calls."""

        def connected() -> OCSClient | None:
            try:
                return OCSClient(self.INSTANCE, args=["--site-file", str(self.site_config)])
            except RuntimeError:  # what OCS raises while the agent has not registered yet
                return None

        client: OCSClient = self.wait_for(connected, deadline_s, "answered a client")
        return client

    def rows(self) -> list[dict[str, Any]]:
        """The rows of its database."""
        return rows(self.db_path)
