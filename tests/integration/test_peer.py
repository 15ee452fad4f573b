"""Compared with the published agent: the same datagrams make the same rows in the same tables, in either's database."""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from socs_monitor.wire.publisher import Publisher, data_file, g3_file
from tests.socs import server_root
from tests.testbed.processes import PEER_BIN, Agent, rows

INDEXES = ["ix_supersync_v0_local_path", "ix_supersync_v0_remote_path", "ix_supersync_v0_stuck"]
StartAgent = Callable[..., Agent]


@pytest.fixture
def root() -> Iterator[Path]:
    with server_root() as root:
        yield root


def data_files(root: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield paths below `root`, and the payloads that register them."""
    dated = "20240105/crate1slot2/1704450000"
    act: dict[str, Any] = {"action": "take_iv", "action_ts": "1704450000", "timestamp": 1704450002.75}

    def same(path: str, **fields: Any) -> tuple[str, dict[str, Any]]:
        return path, data_file(str(root / path), **{**act, **fields})

    yield same(f"{dated}/outputs/1704450001_data.txt", file_format="txt")
    yield same(f"{dated}/outputs/1704450001_data.npy", file_format="npy")
    yield (
        f"{dated}/outputs/1704450002_bare.npy",
        data_file(str(root / dated / "outputs/1704450002_bare"), file_format="npy", **act),
    )
    yield (
        f"{dated}/outputs/1704450003_dotted.v2.npy",
        data_file(str(root / dated / "outputs/1704450003_dotted.v2"), file_format="npy", **act),
    )
    yield same(f"{dated}/outputs/no_suffix_at_all")
    yield same(f"{dated}/outputs/1704450001_drive.txt")  # contains "iv"
    yield same(f"{dated}/outputs/1704450001_iv.npy", file_format="npy")
    yield same(f"{dated}/outputs/1704450001_channel_assignment_b0.txt", file_format="txt")
    yield same(f"{dated}/outputs/1704450001_tune.npy", file_format="npy", file_type="tune")
    yield same(f"{dated}/plots/1704450001_plot.png", file_format="png", plot=True)
    yield same(f"{dated}/plots/1704450002_plot.png", file_format="png", plot=False)
    yield same(f"{dated}/config/config.yml")
    yield same(f"{dated}/outputs/ümlaut_µ.txt")
    yield same(f"{dated}/outputs/odd+name=%25,x@y:z-.txt")
    yield same("20240105/flat.txt")
    yield same("tune/1704450000_tune.npy", file_format="npy")
    yield same("tune/1704450000_channel_assignment_b1.txt")
    yield same("status/1704450000_status.txt")
    yield same("status/20240105/1704450001_status.txt")
    yield same(f"{dated}/outputs/null_action.txt", action=None, action_ts=None)
    yield same(f"{dated}/outputs/null_time.txt", action_ts=None)
    yield same(f"{dated}/outputs/number.txt", action_ts=1704450000)
    yield same(f"{dated}/outputs/spaced.txt", action="odd-action.1+2")
    yield same(f"{dated}/outputs/whole_seconds.txt", timestamp=1704450002)
    yield same(f"{dated}/outputs/early.txt", timestamp=99999.5)
    yield same(f"{dated}/outputs/empty_format.txt", file_format="")
    yield same(f"{dated}/outputs/again.txt", action="first")
    yield same(f"{dated}/outputs/again.txt", action="second")


def g3_files(root: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    for path in (
        "so/timestreams/17044/crate1slot2/1704450000_000.g3",
        "so/timestreams/17044/crate1slot2/1704450000_001.g3",
        "20240105/crate1slot2/tune_iv.g3",
        "elsewhere.g3",
    ):
        yield path, g3_file(str(root / path))


def make_datagrams(root: Path) -> list[bytes]:
    """Write all files, and return the datagrams that register them."""
    pysmurf, streamer = Publisher("crate1slot2"), Publisher("STREAMER:crate1slot2")
    datagrams = []
    for publisher, kind, made in ((pysmurf, "data_file", data_files(root)), (streamer, "g3_file", g3_files(root))):
        with contextlib.closing(publisher):
            for path, payload in made:
                (root / path).parent.mkdir(parents=True, exist_ok=True)
                (root / path).write_text(path)
                datagrams.append(publisher.encode(payload, kind))
    return datagrams


def register(agent: Agent, datagrams: list[bytes]) -> list[dict[str, Any]]:
    """Send datagrams to an agent, wait for their rows, stop the agent, and return the rows without id and timestamp."""
    before = len(agent.rows())
    with contextlib.closing(Publisher("", agent.address)) as publisher:
        for datagram in datagrams:
            publisher.send(datagram)
    agent.wait_for(lambda: len(agent.rows()) >= before + len(datagrams), 20, "registered all")
    agent.stop()
    known = sorted(agent.rows()[before:], key=lambda row: (row["local_path"], row["remote_path"]))
    assert len(known) == len(datagrams)
    return [{name: row[name] for name in row if name not in ("id", "timestamp")} for row in known]


def schema(db_path: Path) -> list[tuple[str, str]]:
    """Return names and statements of everything in a database except the indexes, which the published agent lacks."""
    with contextlib.closing(sqlite3.connect(db_path)) as db:
        return db.execute("SELECT name, sql FROM sqlite_master WHERE type != 'index' ORDER BY 1").fetchall()


def indexes(db_path: Path) -> list[str]:
    with contextlib.closing(sqlite3.connect(db_path)) as db:
        return [name for (name,) in db.execute("SELECT name FROM sqlite_master WHERE type = 'index' ORDER BY 1")]


def test_the_same_datagrams_make_the_same_rows_in_the_same_tables(agent: StartAgent, root: Path) -> None:
    datagrams = make_datagrams(root)
    peer = agent(bin_dir=PEER_BIN)
    theirs = register(peer, datagrams)
    own = agent()
    ours = register(own, datagrams)

    # the published agent marks every g3_file as deletable, and a file in each of its rows
    elsewhere = {str(root / "20240105/crate1slot2/tune_iv.g3"), str(root / "elsewhere.g3")}

    def stays(row: dict[str, Any]) -> bool:
        return row["local_path"] in elsewhere or row["remote_path"].endswith("_first/outputs/again.txt")

    assert [row["deletable"] for row in ours if stays(row)] == [0, 0, 0]
    assert ours == [{**row, "deletable": 0} if stays(row) else row for row in theirs]
    assert {row["archive_name"] for row in ours} == {"smurf", "timestreams"}
    assert {row["deletable"] for row in ours} == {0, 1}
    assert schema(own.db_path) == schema(peer.db_path)
    assert indexes(own.db_path) == INDEXES


def test_a_database_of_the_published_agent_is_continued_here_and_back(agent: StartAgent, root: Path) -> None:
    datagrams = make_datagrams(root)
    peer = agent(bin_dir=PEER_BIN)
    register(peer, datagrams[:5])
    theirs = rows(peer.db_path)
    assert indexes(peer.db_path) == []

    own = agent(db_path=peer.db_path)
    register(own, datagrams[5:10])
    assert rows(own.db_path)[:5] == theirs
    assert indexes(own.db_path) == INDEXES
    assert [own.log.count(f"made the index {index}") for index in INDEXES] == [1, 1, 1]
    own.start()
    own.wait_listening()
    register(own, datagrams[10:15])
    assert "made the index" not in own.log, "only once"

    ours = rows(own.db_path)
    peer.start()
    peer.wait_listening()
    register(peer, datagrams[15:20])
    assert rows(peer.db_path)[:15] == ours
    assert indexes(peer.db_path) == INDEXES
