"""Send files, and read from the disk what became of their registrations, whether or not the agent still runs."""

from __future__ import annotations

import contextlib
import hashlib
import json
import sqlite3
import time
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.testbed.processes import Agent, rows
from tests.testbed.smurf_server import SmurfServer

MIX = ("png", "txt", "g3")  # kinds of files that are announced by the path of their row


def send_files(server: SmurfServer, count: int, rate: float | None = None) -> list[str]:
    """Write and announce files, `rate` a second or all at once, and return their paths."""
    return [message.file for message in server.send(server.messages(count, MIX), rate) if message.file]


def spool_of(agent: Agent) -> Path:
    """Return the default path of the agent's spool."""
    return Path(f"{agent.db_path}.{agent.INSTANCE}.spool")


def spooled(spool_path: Path) -> dict[str, str]:
    """Return path and state of the registrations in a spool, in order; for a repeated path, its latest state."""
    with contextlib.closing(sqlite3.connect(f"file:{spool_path}?mode=ro", uri=True, timeout=10)) as connection:
        found = connection.execute("SELECT message, state FROM registrations ORDER BY id").fetchall()
    return {path_of(message): state for message, state in found}


def path_of(message: str) -> str:
    """Return the path of a registration in the spool, which stores its datagram or only the payload."""
    kept = json.loads(message)
    path: str = kept.get("payload", kept)["path"]
    return path


def entries(agent: Agent) -> list[dict[str, Any]]:
    """Return all columns of each registration in the spool, in order; none if the spool does not exist yet."""
    spool = spool_of(agent)
    if not spool.exists():
        return []
    with contextlib.closing(sqlite3.connect(f"file:{spool}?mode=ro", uri=True, timeout=10)) as connection:
        connection.row_factory = sqlite3.Row
        connection.text_factory = lambda text: text.decode(errors="replace")
        return [dict(row) for row in connection.execute("SELECT * FROM registrations ORDER BY id")]


def acknowledged(agent: Agent) -> set[str]:
    """Return the paths of all files that the agent has accepted: they are in the spool, or have a row."""
    return {*spooled(spool_of(agent)), *(row["local_path"] for row in rows(agent.db_path))}


def md5_of(path: str | Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "md5").hexdigest()


def check_rows(found: Sequence[Mapping[str, Any]], sums: Mapping[str, str], among: Iterable[str] = ()) -> None:
    """Check that each file has exactly one row, with its MD5 sum.

    Args:
        found: All rows.
        sums: MD5 sums of the files that must have a row, by path.
        among: Further files that may have a row, with the sum of their present content.
    """
    times = Counter(row["local_path"] for row in found)
    lost = set(sums) - set(times)
    assert not lost, f"{len(lost)} of {len(sums)} files have no row: {sorted(lost)[:5]}"
    assert set(times.values()) <= {1}, f"more than one row: {[path for path in times if times[path] > 1][:5]}"
    assert set(times) <= {*sums, *among}
    wrong = [row for row in found if row["local_md5sum"] != (sums.get(row["local_path"]) or md5_of(row["local_path"]))]
    assert not wrong, f"{len(wrong)} rows have a wrong sum: {wrong[:3]}"


def check_registered(db_path: Path, paths: Collection[str], among: Iterable[str] = ()) -> None:
    """Check as `check_rows` does, against the present content of the files."""
    check_rows(rows(db_path), {path: md5_of(path) for path in paths}, among)


def wait_acknowledged(agent: Agent, paths: Collection[str], deadline_s: float = 20) -> None:
    """Wait until the agent has accepted all files."""
    agent.wait_for(lambda: acknowledged(agent) >= set(paths), deadline_s, f"accepted {len(paths)} files")


def wait_registered(agent: Agent, paths: Collection[str], deadline_s: float = 20) -> None:
    """Wait until all files have a row, and check that no other file has one."""

    def registered() -> bool:
        return {row["local_path"] for row in agent.rows()} >= set(paths)

    agent.wait_for(registered, deadline_s, f"registered {len(paths)} files")
    check_registered(agent.db_path, paths)


def wait_rows(agent: Agent, paths: Collection[str], deadline_s: float = 20) -> None:
    """Wait until each file has exactly one row, with the sum of its content. Other rows are ignored."""

    def registered() -> bool:
        return {row["local_path"] for row in agent.rows()} >= set(paths)

    agent.wait_for(registered, deadline_s, f"registered {len(paths)} files")
    wanted = set(paths)
    check_rows([row for row in agent.rows() if row["local_path"] in wanted], {path: md5_of(path) for path in paths})


def latencies(agent: Agent, server: SmurfServer, count: int, deadline_s: float = 20) -> list[float]:
    """Register small files one after the other, and return the seconds from sending to the row of each."""
    taken = []
    for _ in range(count):
        begin = time.monotonic()
        wait_rows(agent, send_files(server, 1), deadline_s)
        taken.append(time.monotonic() - begin)
    return taken
