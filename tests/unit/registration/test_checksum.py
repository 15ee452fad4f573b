"""Nothing but a regular file below the data roots is opened, whatever a sender names; and the sum is right."""

from __future__ import annotations

import contextlib
import itertools
import os
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from socs_monitor.registration.checksum import (
    SLICE,
    Access,
    Checksum,
    FileRefusedError,
    Reading,
    check_path,
    checksum,
    fingerprint,
    present_fingerprint,
)
from tests.chain import md5, write_file

MEGABYTE = 1 << 20
ANY = Access()

# None of these may wait for anything: a hang is a failure long before the time-out of the other tests.
pytestmark = pytest.mark.timeout(20)


def at_once(path: str | Path, access: Access = ANY) -> Checksum:
    found = checksum(str(path), access, 1 << 40)
    assert found is not None
    return found


def finish(reading: Reading) -> Checksum:
    while (found := reading.next_slice(lambda: True)) is None:
        pass
    return found


def in_slices(path: str | Path, access: Access = ANY) -> Checksum:
    return finish(Reading(str(path), access))


def look(path: str | Path, access: Access = ANY) -> int:
    return present_fingerprint(str(path), access, {})


# All that opens a file for a sender, or looks at it.
OPENERS: list[Callable[[str | Path, Access], object]] = [at_once, in_slices, look]
HASHERS = [at_once, in_slices]

with_all = pytest.mark.parametrize("opened", OPENERS)


@pytest.mark.parametrize("size", [0, 1, 4096, MEGABYTE - 1, MEGABYTE, MEGABYTE + 1, 5 * MEGABYTE])
@pytest.mark.parametrize("hashed", HASHERS)
def test_the_whole_file_is_hashed(tmp_path: Path, hashed: Callable[[Path], Checksum], size: int) -> None:
    path = tmp_path / "file"
    content = os.urandom(size)
    write_file(path, content)

    assert hashed(path) == Checksum(md5(content), fingerprint(path.stat()))


@pytest.mark.parametrize("change", ["size", "mtime", "inode"])
def test_a_fingerprint_changes_with_size_mtime_and_inode(tmp_path: Path, change: str) -> None:
    path = tmp_path / "file"
    write_file(path, b"content")
    before, times = look(path), (path.stat().st_atime_ns, path.stat().st_mtime_ns)
    assert look(path) == before == fingerprint(path.stat())
    if change == "size":
        path.write_bytes(b"content and more")
        os.utime(path, ns=times)
    elif change == "mtime":
        os.utime(path, ns=(times[0], times[1] + 1))
    else:
        write_file(tmp_path / "other", b"content")
        os.utime(tmp_path / "other", ns=times)
        os.rename(tmp_path / "other", path)

    assert look(path) != before


def test_a_file_above_a_size_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_file(path, b"x" * 100)

    assert checksum(str(path), ANY, 99) is None
    assert checksum(str(path), ANY, 100) == at_once(path)


def test_a_file_with_a_short_read_is_left_to_be_read_in_slices() -> None:
    path = Path("/sys/class/net/lo/mtu")
    content = path.read_bytes()
    assert 0 < len(content) < path.stat().st_size, "the test cannot tell"

    assert checksum(str(path), ANY, MEGABYTE) is None
    assert in_slices(path).md5 == md5(content)


# --- slices


def write_large(path: Path, size: int) -> str:
    """Write a file that is sparse but for its beginning and its end; return its sum."""
    with open(path, "wb") as file:
        file.write(b"begin")
        file.truncate(size)
        file.seek(max(0, size - 3))
        file.write(b"end")
    return md5(path.read_bytes())


@pytest.mark.parametrize("size", [SLICE - 1, SLICE, SLICE + 1, 2 * SLICE, 2 * SLICE + 7])
def test_a_file_is_read_slice_by_slice(tmp_path: Path, size: int) -> None:
    path = tmp_path / "large"
    sum_ = write_large(path, size)
    reading = Reading(str(path), ANY)
    read = [0]
    while (found := reading.next_slice(lambda: True)) is None:
        read.append(reading.read)

    assert found == Checksum(sum_, fingerprint(path.stat()))
    assert {after - before for before, after in itertools.pairwise(read)} <= {SLICE}
    assert reading.read == size
    assert len(read) == 1 + size // SLICE


def test_a_slice_ends_when_it_is_told_to_and_the_next_goes_on_from_there(tmp_path: Path) -> None:
    path = tmp_path / "file"
    content = os.urandom(4 * MEGABYTE + 1)
    write_file(path, content)
    reading = Reading(str(path), ANY)
    asked: list[int] = []

    def go_on() -> bool:
        asked.append(1)
        return len(asked) % 2 == 1

    results = [reading.next_slice(go_on) for _ in range(3)]
    assert results[:2] == [None, None]
    assert results[2] == Checksum(md5(content), fingerprint(path.stat()))
    assert len(asked) == 5, "it is asked after each chunk"


@pytest.fixture
def begun(tmp_path: Path) -> Reading:
    """A file whose first slice was read."""
    write_large(tmp_path / "large", 2 * SLICE)
    reading = Reading(str(tmp_path / "large"), ANY)
    assert reading.next_slice(lambda: True) is None
    return reading


@pytest.mark.parametrize("change", ["replaced by a longer one", "replaced by a shorter one", "cut"])
def test_a_file_that_is_replaced_or_cut_is_read_from_its_beginning(begun: Reading, tmp_path: Path, change: str) -> None:
    path = tmp_path / "large"
    if change == "cut":
        os.truncate(path, SLICE - 1)
        sum_ = md5(path.read_bytes())
    else:
        sum_ = write_large(tmp_path / "other", 3 * SLICE if "longer" in change else 5)
        os.rename(tmp_path / "other", path)

    assert finish(begun) == Checksum(sum_, fingerprint(path.stat()))
    assert begun.read == SLICE + path.stat().st_size, "bytes of the replaced file count, too"


@pytest.mark.parametrize("change", ["grown", "changed in place"])
def test_a_file_that_changes_while_it_is_read_has_its_fingerprint_from_before(
    begun: Reading, tmp_path: Path, change: str
) -> None:
    path = tmp_path / "large"
    before = look(path)
    with open(path, "r+b") as file:
        file.seek(0, os.SEEK_END if change == "grown" else os.SEEK_SET)
        file.write(b"more")
    os.utime(path, ns=(1, 1))
    found = finish(begun)

    assert found.fingerprint == before != look(path)
    assert (found.md5 == md5(path.read_bytes())) is (change == "grown")


def test_a_file_that_grows_while_it_is_read_at_once_is_left_alone(tmp_path: Path) -> None:
    """As the files of /proc, whose size is 0 whatever they hold."""
    assert checksum("/proc/self/status", ANY, MEGABYTE) is None


def test_between_slices_a_file_may_vanish_or_be_refused(begun: Reading, tmp_path: Path) -> None:
    path = tmp_path / "large"
    path.unlink()
    with pytest.raises(FileNotFoundError):
        begun.next_slice(lambda: True)
    os.mkfifo(path)
    with pytest.raises(FileRefusedError, match="a FIFO"):
        begun.next_slice(lambda: True)


# --- what is never opened


@with_all
@pytest.mark.parametrize(
    ("made", "what"),
    [("FIFO", "a FIFO"), ("directory", "a directory"), ("socket", "a socket"), ("/dev/zero", "a character device")],
)
@pytest.mark.parametrize("rooted", [False, True])
def test_anything_but_a_regular_file_is_refused_at_once(
    tmp_path: Path, opened: Callable[[Path, Access], object], made: str, what: str, rooted: bool
) -> None:
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
    link = tmp_path / "link"
    link.symlink_to(path)

    for name in (path, link):
        with pytest.raises(FileRefusedError, match=f"{name} is {what}, not a regular file"):
            opened(name, Access(("/",)) if rooted else ANY)


@with_all
def test_a_missing_file_is_missing_and_not_refused(tmp_path: Path, opened: Callable[[Path, Access], object]) -> None:
    (tmp_path / "dangling").symlink_to(tmp_path / "nothing")
    (tmp_path / "file").touch()
    for name, error in (
        ("nothing", FileNotFoundError),
        ("dangling", FileNotFoundError),
        ("file/x", NotADirectoryError),
    ):
        for access in (ANY, Access((str(tmp_path),))):
            with pytest.raises(error):
                opened(tmp_path / name, access)


@with_all
def test_a_loop_of_links_is_an_os_error(tmp_path: Path, opened: Callable[[Path, Access], object]) -> None:
    (tmp_path / "a").symlink_to(tmp_path / "b")
    (tmp_path / "b").symlink_to(tmp_path / "a")

    for access in (ANY, Access((str(tmp_path),))):
        with pytest.raises(OSError, match="symbolic links"):
            opened(tmp_path / "a", access)


@pytest.fixture
def rooted(tmp_path: Path) -> Access:
    """Two data roots; files of the name ``file`` are in both, beside them, and where a prefix would mislead."""
    for folder in ("root", "second", "rooted", "outside"):
        write_file(tmp_path / folder / "file", folder.encode())
    return Access((str(tmp_path / "root"), str(tmp_path / "second") + "/"))


@pytest.mark.parametrize(
    "name", ["/root/file", "/second/file", "/root/../second/file", "/outside/../root/file", "//root/.//file"]
)
@pytest.mark.parametrize("before", ["", "/", "//"])
def test_files_below_a_data_root_are_taken(tmp_path: Path, rooted: Access, before: str, name: str) -> None:
    path = f"{before}{tmp_path}{name}"
    sum_ = md5(Path(path).read_bytes())

    assert at_once(path, rooted).md5 == in_slices(path, rooted).md5 == sum_
    assert look(path, rooted) == fingerprint(os.stat(path))


@with_all
@pytest.mark.parametrize("name", ["outside/file", "rooted/file", "root/../outside/file", "root/../rooted/file", "root"])
@pytest.mark.parametrize("exists", [True, False])
def test_files_outside_of_the_data_roots_are_refused_whether_they_exist_or_not(
    tmp_path: Path, rooted: Access, opened: Callable[[Path, Access], object], name: str, exists: bool
) -> None:
    path = tmp_path / name if exists else tmp_path / f"{name} of none"
    with pytest.raises(FileRefusedError, match="outside of the data roots"):
        opened(path, rooted)


def test_a_path_is_refused_by_its_text_and_no_disk_is_touched(tmp_path: Path) -> None:
    roots = ("/nowhere/root", "/nowhere/second/")
    for path in ("/nowhere/root/file", "/nowhere/second/x/../file", "//nowhere/root/file"):
        check_path(path, roots)
    for path in ("/nowhere/root", "/nowhere/rooted/file", "/nowhere/root/../file", "/etc/passwd", "file", ""):
        with pytest.raises(FileRefusedError, match="outside of the data roots /nowhere/root, /nowhere/second/"):
            check_path(path, roots)
        check_path(path, ())


@with_all
def test_a_link_below_a_data_root_counts_as_what_it_leads_to(
    tmp_path: Path, rooted: Access, opened: Callable[[Path, Access], object]
) -> None:
    (tmp_path / "root" / "in").symlink_to(tmp_path / "second" / "file")
    (tmp_path / "root" / "out").symlink_to(tmp_path / "outside" / "file")
    (tmp_path / "root" / "folder").symlink_to(tmp_path / "outside")
    (tmp_path / "outside" / "back").symlink_to(tmp_path / "root" / "file")

    assert opened(tmp_path / "root" / "in", rooted) == opened(tmp_path / "second" / "file", rooted)
    for name in ("out", "folder/file", "folder/none"):
        with pytest.raises(FileRefusedError, match="outside of the data roots"):
            opened(tmp_path / "root" / name, rooted)
    with pytest.raises(FileRefusedError, match="outside of the data roots"):
        opened(tmp_path / "outside" / "back", rooted)


@with_all
def test_a_data_root_may_be_a_link(tmp_path: Path, rooted: Access, opened: Callable[[Path, Access], object]) -> None:
    (tmp_path / "linked").symlink_to(tmp_path / "root")
    access = Access((str(tmp_path / "linked"),))
    expected = opened(tmp_path / "root" / "file", rooted)

    assert opened(tmp_path / "linked" / "file", access) == expected
    assert opened(tmp_path / "root" / "file", access) == expected
    for name in ("linked/../outside/file", "outside/file", "rooted/file"):
        with pytest.raises(FileRefusedError, match="outside of the data roots"):
            opened(tmp_path / name, access)


@with_all
def test_everything_is_below_the_root_of_the_file_system(
    tmp_path: Path, opened: Callable[[Path, Access], object]
) -> None:
    write_file(tmp_path / "file", b"x")

    assert opened(tmp_path / "file", Access(("/",))) == opened(tmp_path / "file", ANY)


@pytest.mark.parametrize("name", ["db", "db-wal", "db.set-aside", "link", "hard"])
def test_the_monitors_own_databases_are_never_opened(tmp_path: Path, name: str) -> None:
    for suffix in ("", "-wal", "-shm", ".set-aside"):
        (tmp_path / f"db{suffix}").touch()
    (tmp_path / "link").symlink_to(tmp_path / "db-shm")
    os.link(tmp_path / "db-wal", tmp_path / "hard")
    own = (str(tmp_path / "db"),)

    for access in (Access((), own), Access((str(tmp_path),), own)):
        for hashed in HASHERS:
            with pytest.raises(FileRefusedError, match="own databases"):
                hashed(tmp_path / name, access)


def test_no_descriptor_stays_open(tmp_path: Path, rooted: Access) -> None:
    write_large(tmp_path / "root" / "large", SLICE + 1)

    def try_all() -> None:
        for name in ("root/file", "outside/file", "root", "root/none"):
            for access in (rooted, ANY):
                for opened in OPENERS:
                    with contextlib.suppress(FileRefusedError, OSError):
                        opened(tmp_path / name, access)
        checksum(str(tmp_path / "root" / "large"), rooted, 0)
        Reading(str(tmp_path / "root" / "large"), rooted).next_slice(lambda: True)

    try_all()
    before = os.listdir("/proc/self/fd")
    try_all()
    assert os.listdir("/proc/self/fd") == before
