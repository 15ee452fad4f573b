"""Nothing but a regular file below the data roots is opened, whatever a sender names; and the sum is right."""

from __future__ import annotations

import contextlib
import hashlib
import os
import socket
from pathlib import Path

import pytest
from socs_monitor.checksum import Checksum, FileRefusedError, StoppedError, checksum, fingerprint, present_fingerprint

from tests.chain import md5, write_file

MEGABYTE = 1 << 20

# None of these may wait for anything: a hang is a failure long before the time-out of the other tests.
pytestmark = pytest.mark.timeout(20)


@pytest.mark.parametrize("size", [0, 1, 4096, MEGABYTE - 1, MEGABYTE, MEGABYTE + 1, 5 * MEGABYTE])
def test_the_sum_is_that_of_the_whole_file(tmp_path: Path, size: int) -> None:
    path = tmp_path / "file"
    content = os.urandom(size)
    write_file(path, content)

    assert checksum(str(path)) == Checksum(hashlib.md5(content).hexdigest(), fingerprint(path.stat()))


@pytest.mark.parametrize("change", ["size", "mtime", "inode"])
def test_a_fingerprint_tells_a_change(tmp_path: Path, change: str) -> None:
    path = tmp_path / "file"
    write_file(path, b"content")
    before, times = fingerprint(path.stat()), (path.stat().st_atime_ns, path.stat().st_mtime_ns)
    assert fingerprint(path.stat()) == before
    if change == "size":
        path.write_bytes(b"content and more")
        os.utime(path, ns=times)
    elif change == "mtime":
        os.utime(path, ns=(times[0], times[1] + 1))
    else:
        write_file(tmp_path / "other", b"content")
        os.utime(tmp_path / "other", ns=times)
        os.rename(tmp_path / "other", path)

    assert fingerprint(path.stat()) != before


def test_a_file_above_a_size_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_file(path, b"x" * 100)

    assert checksum(str(path), at_most=99) is None
    assert checksum(str(path), at_most=100) == checksum(str(path))


@pytest.mark.parametrize(
    ("made", "what"),
    [("FIFO", "a FIFO"), ("directory", "a directory"), ("socket", "a socket"), ("/dev/zero", "a character device")],
)
def test_what_is_no_regular_file_is_refused_at_once(tmp_path: Path, made: str, what: str) -> None:
    path = tmp_path / "special"
    if made == "FIFO":
        os.mkfifo(path)  # nobody ever writes to it
    elif made == "directory":
        path.mkdir()
    elif made == "socket":
        with socket.socket(socket.AF_UNIX) as listening:
            listening.bind(str(path))
    else:
        path = Path(made)

    with pytest.raises(FileRefusedError, match=f"{path} is {what}, not a regular file"):
        checksum(str(path))
    link = tmp_path / "link"
    link.symlink_to(path)
    with pytest.raises(FileRefusedError, match=what):
        checksum(str(link))


def test_a_missing_file_is_missing_and_not_refused(tmp_path: Path) -> None:
    (tmp_path / "dangling").symlink_to(tmp_path / "nothing")
    (tmp_path / "file").touch()
    for name, error in (
        ("nothing", FileNotFoundError),
        ("dangling", FileNotFoundError),
        ("file/x", NotADirectoryError),
    ):
        with pytest.raises(error):
            checksum(str(tmp_path / name), (str(tmp_path),))


def test_links_in_a_circle_are_an_error_of_the_system(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to(tmp_path / "b")
    (tmp_path / "b").symlink_to(tmp_path / "a")

    with pytest.raises(OSError, match="symbolic links"):
        checksum(str(tmp_path / "a"))


@pytest.fixture
def roots(tmp_path: Path) -> tuple[str, ...]:
    """Two data roots; files of the name ``file`` are in both, beside them, and where a prefix would mislead."""
    for folder in ("root", "second", "rooted", "outside"):
        write_file(tmp_path / folder / "file", folder.encode())
    return str(tmp_path / "root"), str(tmp_path / "second") + "/"


@pytest.mark.parametrize("name", ["root/file", "second/file", "root/../second/file", "outside/../root/file"])
def test_files_below_a_data_root_are_taken(tmp_path: Path, roots: tuple[str, ...], name: str) -> None:
    path = tmp_path / name
    found = checksum(str(path), roots)

    assert found is not None
    assert found.md5 == md5(path.read_bytes())


@pytest.mark.parametrize("name", ["outside/file", "rooted/file", "root/../outside/file", "root/../rooted/file"])
def test_files_outside_of_the_data_roots_are_refused(tmp_path: Path, roots: tuple[str, ...], name: str) -> None:
    with pytest.raises(FileRefusedError, match="outside of the data roots"):
        checksum(str(tmp_path / name), roots)
    assert checksum(str(tmp_path / name)) is not None


@pytest.mark.parametrize("name", ["outside/none", "root/../outside/none", "rooted/none"])
def test_whether_a_file_outside_of_the_data_roots_exists_is_not_told(
    tmp_path: Path, roots: tuple[str, ...], name: str
) -> None:
    with pytest.raises(FileRefusedError, match="outside of the data roots"):
        checksum(str(tmp_path / name), roots)


def test_a_link_counts_as_what_it_leads_to(tmp_path: Path, roots: tuple[str, ...]) -> None:
    (tmp_path / "root" / "in").symlink_to(tmp_path / "second" / "file")
    (tmp_path / "root" / "out").symlink_to(tmp_path / "outside" / "file")
    (tmp_path / "root" / "folder").symlink_to(tmp_path / "outside")
    (tmp_path / "outside" / "back").symlink_to(tmp_path / "root" / "file")

    assert checksum(str(tmp_path / "root" / "in"), roots) == checksum(str(tmp_path / "second" / "file"))
    assert checksum(str(tmp_path / "outside" / "back"), roots) == checksum(str(tmp_path / "root" / "file"))
    for name in ("out", "folder/file"):
        with pytest.raises(FileRefusedError, match=f"is {tmp_path}/outside/file, outside of the data roots"):
            checksum(str(tmp_path / "root" / name), roots)


def test_everything_is_below_the_root_of_the_file_system(tmp_path: Path) -> None:
    write_file(tmp_path / "file", b"x")

    assert checksum(str(tmp_path / "file"), ("/",)) is not None


def test_a_large_file_is_given_up_at_a_stop(tmp_path: Path) -> None:
    path = tmp_path / "large"
    write_file(path, b"x" * 4 * MEGABYTE)
    asked: list[int] = []

    def stopped() -> bool:
        asked.append(1)
        return len(asked) == 2

    with pytest.raises(StoppedError):
        checksum(str(path), stopped=stopped)
    assert len(asked) == 2


def test_no_descriptor_stays_open(tmp_path: Path, roots: tuple[str, ...]) -> None:
    def try_all() -> None:
        for name in ("root/file", "outside/file", "root", "root/none"):
            for use in (checksum, lambda path, roots: present_fingerprint(path, roots, ())):
                with contextlib.suppress(FileRefusedError, OSError):
                    use(str(tmp_path / name), roots)

    try_all()
    before = os.listdir("/proc/self/fd")
    try_all()
    assert os.listdir("/proc/self/fd") == before


def test_the_present_fingerprint_is_that_of_the_sum_and_refused_alike(tmp_path: Path, roots: tuple[str, ...]) -> None:
    path = str(tmp_path / "root" / "file")
    found = checksum(path, roots)
    assert found is not None
    assert present_fingerprint(path, roots, ()) == present_fingerprint(path, (), ()) == found.fingerprint

    for name in ("outside/file", "root", "outside/none"):
        with pytest.raises(FileRefusedError):
            present_fingerprint(str(tmp_path / name), roots, ())
    with pytest.raises(FileRefusedError, match="own databases"):
        present_fingerprint(path, roots, (path,))
    with pytest.raises(FileNotFoundError):
        present_fingerprint(str(tmp_path / "root" / "none"), roots, ())
