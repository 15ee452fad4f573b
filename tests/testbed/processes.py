"""Real processes for tests, `make demo`, `make run` and the benchmark: the router and the agent.

Each is a context manager with its own folder and ports. Starting it waits for a condition, never for a time. Nothing is
left running: the context stops its process, and the kernel kills the process if the whole test run dies.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
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

from tests.testbed.ports import free_tcp_port, free_udp_port, udp_port_is_bound

ROOT = Path(__file__).resolve().parents[2]
ENVS = ROOT / ".envs"
CROSSBAR = ENVS / "crossbar" / "bin" / "crossbar"
PEER_BIN = ENVS / "socs" / "bin"  # the published socs, with its agent and SupRsync
OWN_BIN = Path(sys.executable).parent  # the environment that runs the tests
SITE_CONFIG = ROOT / "site-config.example.yaml"
REALM = "test_realm"
DOCUMENTED = ("--udp-port", "--create-table", "--db-path", "--echo-sql", "--test-mode")

T = TypeVar("T")

# The kernel kills the process when the thread that started it dies, so a test run that is killed leaves nothing behind.
# Nothing is inherited from a parent that ignores Ctrl-C, as `nohup` and a shell's background jobs do.
_LAUNCHER = """
import ctypes, os, signal, sys
signal.signal(signal.SIGINT, signal.SIG_DFL)
ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
if os.getppid() == int(sys.argv[1]):
    os.execv(sys.argv[2], sys.argv[2:])
"""


def require(tool: str | Path) -> Path:
    """Return the path of a program that a test needs, or call `unavailable`."""
    found = shutil.which(tool)
    if found is None:
        reason = f"{tool} is not installed"
        if ENVS in Path(tool).parents:
            reason += ": `make test` installs it"
        unavailable(reason)
    return Path(found)


def unavailable(reason: str, *, even_in_ci: bool = False) -> NoReturn:
    """Skip the test because this machine lacks something. With ``CI=true``, fail instead, unless `even_in_ci` is set.

    Raises:
        unittest.SkipTest: pytest takes it for a skip, and it needs no pytest elsewhere.
        AssertionError: In CI.
    """
    if os.environ.get("CI") == "true" and not even_in_ci:
        raise AssertionError(reason)
    raise unittest.SkipTest(reason)


def wait_until(condition: Callable[[], T], deadline_s: float, what: str) -> T:
    """Wait until `condition()` is true, and return its value.

    Raises:
        AssertionError: If it is still false after `deadline_s` seconds. `what` completes "waiting until".
    """
    deadline = time.monotonic() + deadline_s
    while not (result := condition()):
        if time.monotonic() > deadline:
            raise AssertionError(f"timed out after {deadline_s:g} s, waiting until {what}")
        time.sleep(0.02)
    return result


def rows(db_path: str | Path, table: str = "supersync_v0") -> list[dict[str, Any]]:
    """Return all rows of a table, in the order of their ids; none if the database or the table does not exist yet."""
    if not os.path.exists(db_path):
        return []
    with contextlib.closing(sqlite3.connect(f"file:{db_path}?mode=ro", uri=True, timeout=10)) as connection:
        connection.row_factory = sqlite3.Row
        if not connection.execute("SELECT 1 FROM sqlite_master WHERE name = ?", (table,)).fetchone():
            return []
        return [dict(row) for row in connection.execute(f"SELECT * FROM {table} ORDER BY id")]


class Process:
    """A child process that logs to a file.

    Args:
        command: Full path of the program, and its arguments.
        log_path: File to which standard output and standard error are appended.
        env: Environment variables in addition to the inherited ones.
        cwd: Working directory.
    """

    def __init__(
        self, command: Sequence[str | Path], log_path: Path, env: Mapping[str, str] | None = None, cwd: Path = ROOT
    ) -> None:
        self.command = [str(part) for part in command]
        self.log_path = log_path
        self._env = {**os.environ, "PYTHONUNBUFFERED": "1", **(env or {})}
        self._cwd = cwd
        self._log_begin = 0  # offset at the latest start, bytes
        self._read_to = 0  # offset up to which `new_lines` has read, bytes
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
        """Process id."""
        assert self._process is not None, "not started"
        return self._process.pid

    @property
    def exit_code(self) -> int | None:
        """Exit code, negative for a signal; None while the process runs."""
        assert self._process is not None, "not started"
        return self._process.poll()

    @property
    def log(self) -> str:
        """Output since the latest start."""
        with open(self.log_path, "rb") as log:
            log.seek(self._log_begin)
            return log.read().decode(errors="replace")

    def new_lines(self) -> list[str]:
        """Return the complete lines printed since the previous call."""
        with open(self.log_path, "rb") as log:
            log.seek(self._read_to)
            *lines, rest = log.read().split(b"\n")
            self._read_to = log.tell() - len(rest)
        return [line.decode(errors="replace") for line in lines]

    def start(self) -> None:
        """Start the process, for the first time or again."""
        assert self._process is None or self.exit_code is not None, "still running"
        launcher = [sys.executable, "-ISc", _LAUNCHER, str(os.getpid())]
        with open(self.log_path, "ab") as log:
            self._log_begin = log.tell()
            if self._process is None:
                self._read_to = self._log_begin
            self._process = subprocess.Popen(
                [*launcher, *self.command],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=self._env,
                cwd=self._cwd,
                process_group=0,  # Ctrl-C reaches only the tests, and `kill` reaches the children, too
            )

    def stop(self, deadline_s: float = 15) -> int | None:
        """Send SIGTERM and return the exit code.

        Raises:
            AssertionError: If the process still runs after `deadline_s` seconds. It is killed.
        """
        if self._process is None:
            return None
        if self._process.poll() is None:
            self._process.terminate()
        try:
            return self._process.wait(deadline_s)
        except subprocess.TimeoutExpired:
            self.kill()
            raise AssertionError(
                f"{self} still runs {deadline_s:g} s after SIGTERM; its log ends:\n{self._tail()}"
            ) from None

    def kill(self) -> None:
        """Kill the process and its children (SIGKILL)."""
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()

    def wait(self, deadline_s: float = 30) -> int:
        """Wait until the process ends by itself, and return its exit code."""
        wait_until(lambda: self.exit_code is not None, deadline_s, f"{self} ends")
        assert self.exit_code is not None
        return self.exit_code

    def wait_log(self, pattern: str, deadline_s: float = 30) -> re.Match[str]:
        """Wait for a line of the log that matches `pattern` anywhere."""
        return self.wait_for(lambda: re.search(pattern, self.log, re.MULTILINE), deadline_s, f"logged {pattern!r}")

    def wait_for(self, condition: Callable[[], T], deadline_s: float, what: str) -> T:
        """Wait as `wait_until` does, but fail at once if the process ends, and show the end of its log."""

        def alive_and() -> T:
            ended = self.exit_code is not None  # read first, so that its last actions count
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
    """A real crossbar router on the loopback interface. It keeps its port when it is started again.

    Args:
        folder: Scratch folder for its node directory.
        port: TCP port; default: a free one.
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
        """WebSocket address, for agents."""
        return f"ws://127.0.0.1:{self.port}/ws"

    @property
    def http_url(self) -> str:
        """HTTP address, for clients."""
        return f"http://127.0.0.1:{self.port}/call"

    def start(self) -> None:
        """Start the router and wait until it answers."""
        super().start()
        self.wait_for(self._answers, 60, "answered")

    def _answers(self) -> bool:
        # An agent logs an error if the realm does not exist yet, so a call has to work, not only a page.
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
        router: Router of the hub.
        udp_port: Value of ``--udp-port``.
        db_path: Value of ``--db-path``.
        options: Further options of the agent, as in a site config: ``[["--create-table", False]]``.
        published: Omit the options that the published agent does not have.
        instance_id: The agent's instance-id; default: the example's.
    """
    config = yaml.safe_load(SITE_CONFIG.read_text())
    config["hub"] |= {"wamp_server": router.ws_url, "wamp_http": router.http_url}
    instance = config["hosts"]["localhost"]["agent-instances"][0]
    # a scratch folder may be anywhere
    ours = [["--data-root", "/"], ["--udp-port", udp_port], ["--db-path", str(db_path)], *options]
    merged = {option[0]: [*option] for option in [*instance["arguments"], *ours]}
    instance["instance-id"] = instance_id or instance["instance-id"]
    instance["arguments"] = [option for option in merged.values() if not published or option[0] in DOCUMENTED]
    path.write_text(yaml.safe_dump(config))


class Agent(Process):
    """The real agent, started as a site does: `ocs-agent-cli --instance-id pysmurf-monitor`, with a site config.

    Args:
        folder: Scratch folder for the site config, the log and (by default) the database.
        router: Router to connect to; it need not run.
        udp_port: UDP port; default: a free one.
        db_path: Database; default: ``suprsync.db`` in `folder`.
        options: Further options of the agent, as for `write_site_config`.
        arguments: Further command line arguments. OCS accepts only its own, such as ``--crossbar-timeout``.
        env: Environment variables to add.
        bin_dir: Programs of the environment whose `ocs-agent-cli` is used: `OWN_BIN` or `PEER_BIN`.
        instance: Its instance-id. Two agents on one router need different ones.
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
            # the tests measure coverage, so the agent does, too; pytest-cov combines its file with those of the tests
            rcfile = ROOT / "pyproject.toml"
            command = [OWN_BIN / "python", "-m", "coverage", "run", f"--rcfile={rcfile}", "-m", "ocs.agent_cli"]
            env = {"COVERAGE_FILE": str(ROOT / ".coverage"), **(env or {})}
        command += ["--site-file", self.site_config, "--instance-id", self.INSTANCE, *arguments]
        super().__init__(command, folder / "agent.log", env, folder)

    @property
    def address(self) -> tuple[str, int]:
        """Host and UDP port for senders."""
        return "127.0.0.1", self.udp_port

    def wait_listening(self, deadline_s: float = 30) -> None:
        """Wait until the UDP port is bound: the agent receives what is sent from now on."""
        self.wait_for(lambda: udp_port_is_bound(self.udp_port), deadline_s, "bound its UDP port")

    def client(self, deadline_s: float = 30) -> OCSClient:
        """Return a real client, as soon as the agent answers calls via the router."""

        def connected() -> OCSClient | None:
            try:
                return OCSClient(self.INSTANCE, args=["--site-file", str(self.site_config)])
            except RuntimeError:  # OCS raises this while the agent is not connected
                return None

        client: OCSClient = self.wait_for(connected, deadline_s, "answered a client")
        return client

    def rows(self) -> list[dict[str, Any]]:
        """Return the rows of its database."""
        return rows(self.db_path)
