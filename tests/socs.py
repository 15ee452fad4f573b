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

from tests.harness import PEER_BIN, require

# As the run process of the SupRsync agent: copy, verify, mark time codes, delete. Prints what came of it.
_SUPRSYNC = """
import json, sys
from socs.db.suprsync import SupRsyncFileHandler, SupRsyncFilesManager
db_path, archive, base, work, delete_after, ssh_host = sys.argv[1:]
manager = SupRsyncFilesManager(db_path, create_all=False)
handler = SupRsyncFileHandler(manager, archive, base, ssh_host=ssh_host or None)
before = manager.get_archive_stats(archive)
copied = handler.copy_files(max_copy_attempts=3)
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
