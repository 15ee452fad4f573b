"""The model of SupRsync does what the published code does, whatever happens between its steps."""

from __future__ import annotations

import contextlib
import os
import random
import sqlite3
import time
from pathlib import Path
from typing import Any

from socs_monitor.suprsync.database import Database
from tests.socs import run_scripts
from tests.suprsync_model import SupRsync
from tests.suprsync_script import Outside, Step, random_script

# More of them: SUPRSYNC_SCRIPTS=2000 in the environment.
SCRIPTS = int(os.environ.get("SUPRSYNC_SCRIPTS", "200"))


def run_with_model(folder: Path, script: list[Step]) -> Any:
    folder.mkdir()
    database = Database(str(folder / "suprsync.db"), create_table=True, echo=False, report=print)
    database.register([])
    database.close()
    outside = Outside(folder)
    suprsync = SupRsync(folder / "suprsync.db", "smurf", time.time)
    for kind, *arguments in [*script, *[["step"]] * 4]:
        if kind == "copy":
            suprsync.select()
        elif kind == "delete":
            suprsync.select_deletable(0.0)
        elif kind != "step":
            outside([kind, *arguments])
        elif suprsync.next:
            with contextlib.suppress(sqlite3.OperationalError):
                suprsync.step()
    return outside.result(suprsync.archive)


def with_locks(script: list[Step], choose: random.Random) -> list[Step]:
    """Now and then a lock around the last step of a session, which is its commit."""
    locked: list[Step] = []
    for number, step in enumerate(script):
        ends = step[0] == "step" and (number + 1 == len(script) or script[number + 1][0] in ("copy", "delete"))
        locked += [["lock"], step, ["lock"]] if ends and choose.random() < 0.15 else [step]
    return locked


def test_the_model_of_suprsync_does_what_the_published_code_does(tmp_path: Path) -> None:
    choose = random.Random(0)
    scripts = [with_locks(random_script(choose), choose) for _ in range(SCRIPTS)]
    (tmp_path / "model").mkdir()
    (tmp_path / "published").mkdir()
    published = run_scripts(tmp_path / "published", scripts)

    for number, (script, expected) in enumerate(zip(scripts, published, strict=True)):
        assert run_with_model(tmp_path / "model" / str(number), script) == expected, script
    copied = sum(bool(archive) for _, _, archive in published)
    deleted = sum(any(row["removed"] == "a time" for row in rows) for rows, _, _ in published)
    assert copied > SCRIPTS / 4
    assert deleted > SCRIPTS / 10
