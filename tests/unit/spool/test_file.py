"""Opening a spool: for one process, and never at the cost of one that cannot be read."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from socs_monitor.spool.file import SpoolBusyError, SpoolError
from socs_monitor.spool.store import Spool
from tests.chain import execute
from tests.unit.test_spool import OpenSpool, counts, incoming


def test_only_one_process_has_a_spool(open_spool: OpenSpool, path: str) -> None:
    first = open_spool()
    with pytest.raises(SpoolBusyError, match=r"in use by another process .*fuser .*spool\.lock.*--spool-path"):
        open_spool()
    first.accept([incoming(0)])
    first.close()

    assert counts(open_spool()) == {"pending": 1, "received": 1}


@pytest.mark.parametrize("damage", ["unknown version", "no database", "corrupt", "truncated"])
def test_a_spool_that_cannot_be_read_is_set_aside_whole_and_a_new_one_begun(
    open_spool: OpenSpool, path: str, said: list[str], damage: str
) -> None:
    spool = open_spool()
    spool.accept([incoming(number) for number in range(300)])
    spool.close()
    content = Path(path).read_bytes()
    if damage == "unknown version":
        execute(path, "PRAGMA user_version = 99")
    else:
        middle = len(content) // 2
        damaged = {
            "no database": b"x" * 5000,
            "corrupt": content[:middle] + os.urandom(8192) + content[middle + 8192 :],
            "truncated": content[:8192],
        }[damage]
        Path(path).write_bytes(damaged)
    before = Path(path).read_bytes()

    spool = open_spool()
    assert counts(spool) == {}
    assert spool.accept([incoming(0)]) == [1]
    (line,) = said
    assert f"the spool {path} cannot be read" in line
    (aside,) = [entry for entry in Path(path).parent.iterdir() if entry.name.endswith(".set-aside")]
    assert f"set aside as {aside}" in line
    assert aside.read_bytes() == before


def test_a_spool_that_cannot_be_opened_is_left_and_let_go_of(open_spool: OpenSpool, path: str) -> None:
    os.mkdir(path)
    with pytest.raises(SpoolError, match=f"cannot open the spool {path}"):
        open_spool()
    os.rmdir(path)

    open_spool()


def test_a_spool_below_a_file_cannot_be_opened(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(SpoolError, match="cannot open the spool"):
        Spool(str(tmp_path / "file" / "spool"), print)


def test_the_folder_of_a_spool_is_made(tmp_path: Path) -> None:
    spool = Spool(str(tmp_path / "a" / "b" / "spool"), print)
    spool.close()

    assert (tmp_path / "a" / "b" / "spool").is_file()
