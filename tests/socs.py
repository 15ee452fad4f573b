"""The published socs package, in its own environment: what SupRsync does, done by its own code."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from tests.testbed.processes import PEER_BIN, require

# As the run process of the SupRsync agent: copy, verify, mark time codes, delete. Prints what came of it.
_SUPRSYNC = """
import json, sys
from socs.db.suprsync import SupRsyncFileHandler, SupRsyncFilesManager
db_path, archive, base, work, delete_after, ssh_host = sys.argv[1:]
manager = SupRsyncFilesManager(db_path, create_all=False)
handler = SupRsyncFileHandler(manager, archive, base, ssh_host=ssh_host or None)
before = manager.get_archive_stats(archive)
copied = handler.copy_files(max_copy_attempts=5)
manager.create_all_timecode_dirs(archive)
manager.update_all_timecode_dirs(archive, work, "suprsync-test")
handler.delete_files(float(delete_after))
print(json.dumps([copied, before, manager.get_archive_stats(archive)]))
"""


class Round(NamedTuple):
    """What one round of SupRsync did: files with whether their copy was verified; the archive's state around it."""

    copied: list[tuple[str, bool]]
    before: dict[str, Any]
    after: dict[str, Any]


def suprsync(
    db_path: Path,
    archive: str,
    base: Path,
    *,
    delete_after: float = 1e9,
    ssh_host: str = "",
    programs: Path | None = None,
) -> Round:
    """Do one round of the published SupRsync on an archive, to the folder `base` of this host, with real rsync.

    Args:
        db_path: The database.
        archive: ``smurf`` or ``timestreams``.
        base: Folder that the files are copied below.
        delete_after: Age in seconds from which deletable files are deleted.
        ssh_host: As the agent's ``--ssh-host``; default is to copy without ssh.
        programs: Folder of programs to run instead of the installed ones (ssh, rsync).
    """
    require("rsync")
    python = require(PEER_BIN / "python")
    base.mkdir(exist_ok=True)
    work = base.with_name(base.name + "-work")
    arguments = [str(db_path), archive, str(base), str(work), str(delete_after), ssh_host]
    path = os.pathsep.join([*([str(programs)] if programs else []), os.environ["PATH"]])
    command = [python, "-c", _SUPRSYNC, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env={**os.environ, "PATH": path})
    assert done.returncode == 0, done.stderr
    copied, before, after = json.loads(done.stdout.splitlines()[-1])
    return Round([(path, verified) for path, verified in copied], before, after)


# One session of the handler, which waits for a line on standard input before its commit.
_SESSION = """
import os, sys
from socs.db.suprsync import SupRsyncFileHandler, SupRsyncFilesManager
from sqlalchemy import event
control = os.fdopen(os.dup(0))
os.dup2(os.open(os.devnull, os.O_RDONLY), 0)  # md5sum without a file reads it
kind, db_path, archive, base = sys.argv[1:]
manager = SupRsyncFilesManager(db_path, create_all=False)
handler = SupRsyncFileHandler(manager, archive, base)

def wait(session):
    print("waits", flush=True)
    control.readline()

event.listen(manager.Session, "before_commit", wait)
if kind == "copy":
    handler.copy_files(max_copy_attempts=5)
else:
    handler.delete_files(-1.0)
"""


@contextmanager
def session(kind: str, db_path: Path, archive: str, base: Path) -> Iterator[None]:
    """A session of the published SupRsync that has done its work, and commits it at the end of the context.

    Args:
        kind: ``copy``, or ``delete`` for all that is verified, whatever its age.
        db_path: The database.
        archive: ``smurf`` or ``timestreams``.
        base: Folder that the files are copied below.
    """
    require("rsync")
    base.mkdir(exist_ok=True)
    arguments = [str(require(PEER_BIN / "python")), "-c", _SESSION, kind, str(db_path), archive, str(base)]
    with subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            while (line := process.stdout.readline()) != "waits\n":
                assert line, f"it ended with {process.wait(10)}"
            yield
            process.communicate("go\n", timeout=30)
        finally:
            process.kill()
    assert process.returncode == 0


# As the published monitor adds a file.
_ADD = """
import sys
from socs.db.suprsync import SupRsyncFilesManager
db_path, archive, local_path, remote_path = sys.argv[1:]
SupRsyncFilesManager(db_path).add_file(local_path, remote_path, archive)
"""


def add_file(db_path: Path, archive: str, local_path: Path, remote_path: str) -> None:
    """Add a row for a file, as the published agent does."""
    arguments = [str(require(PEER_BIN / "python")), "-c", _ADD, str(db_path), archive, str(local_path), remote_path]
    subprocess.run(arguments, check=True, timeout=60)


@contextmanager
def server_root() -> Iterator[Path]:
    """A scratch folder of two components: a dated folder in it is the third, as in ``/data/smurf_data/20240105``.

    Its name is of digits: letters at random may spell "iv", and what has that in its path is never deleted.
    """
    root = Path("/tmp", f"socs-monitor-{time.time_ns()}")
    root.mkdir()
    try:
        yield root
    finally:
        shutil.rmtree(root)


# Runs scripts of `tests.suprsync_model.run_script` with the published code: the same steps, at the same places. Reads
# [folder, scripts] as JSON from standard input and prints the results as JSON.
_SCRIPTS = """
import contextlib, hashlib, json, os, subprocess, sys
from pathlib import Path
from sqlalchemy import event, exc
import socs.db.suprsync as published
import txaio

txaio.use_twisted()
BASE = "/base"
state = {}


def until_step():
    for step in state["script"]:
        if step[0] == "step":
            return
        state["outside"](step)


def run(command, **_):
    until_step()
    if command[0] == "rsync":
        root, failed = command[-2], False
        for folder, _, names in os.walk(root):
            for name in names:
                path = os.path.join(folder, name)
                try:
                    content = Path(path).read_bytes()
                except FileNotFoundError:
                    failed = True
                else:
                    state["archive"][os.path.relpath(path, root)] = content
        if failed:
            raise subprocess.CalledProcessError(23, command)
        return subprocess.CompletedProcess(command, 0)
    assert command[0] == "md5sum"
    sums = [(hashlib.md5(state["archive"][os.path.relpath(path, BASE)]).hexdigest(), path) for path in command[1:]]
    return subprocess.CompletedProcess(command, 0, "".join(f"{s}  {path}\\n" for s, path in sums).encode(), b"")


def noting(method):
    def noted(*args, **kwargs):
        files = method(*args, **kwargs)
        if files:
            state["open"] = True
            until_step()
        return files
    return noted


published.subprocess.run = run
published.SupRsyncFilesManager.get_copyable_files = noting(published.SupRsyncFilesManager.get_copyable_files)
published.SupRsyncFilesManager.get_deletable_files = noting(published.SupRsyncFilesManager.get_deletable_files)


def before_commit(session):
    if state["open"]:
        state["open"] = False
        until_step()


folder, scripts = json.load(sys.stdin)
results = []
sys.path.insert(0, os.getcwd())
from tests.suprsync_script import Outside
for number, script in enumerate(scripts):
    place = Path(folder, str(number))
    place.mkdir()
    manager = published.SupRsyncFilesManager(str(place / "suprsync.db"))
    event.listen(manager._engine, "connect", lambda db, _: db.execute("PRAGMA busy_timeout = 0"))
    manager._engine.dispose()
    event.listen(manager.Session, "before_commit", before_commit)
    handler = published.SupRsyncFileHandler(manager, "smurf", BASE)
    outside = Outside(place)
    state.update(script=iter(script), archive={}, open=False, outside=outside)
    for step in state["script"]:
        with contextlib.suppress(subprocess.CalledProcessError, exc.OperationalError):
            if step[0] == "copy":
                handler.copy_files(max_copy_attempts=5)
            elif step[0] == "delete":
                handler.delete_files(0.0)
            elif step[0] != "step":
                outside(step)
        state["open"] = False
    results.append(outside.result(state["archive"]))
    manager._engine.dispose()
json.dump(results, sys.stdout)
"""


def run_scripts(folder: Path, scripts: list[list[Any]]) -> list[Any]:
    """Run scripts of `tests.suprsync_script` with the published SupRsync, and return the result of each."""
    python = require(PEER_BIN / "python")
    program = _SCRIPTS
    done = subprocess.run(
        [python, "-c", program], input=json.dumps([str(folder), scripts]), capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 0, done.stderr
    results: list[Any] = json.loads(done.stdout.splitlines()[-1])
    return results
