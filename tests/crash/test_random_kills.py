"""Spool, intake, registrar and database, killed at random moments while they accept and register files.

``SOCS_MONITOR_CRASH_ROUNDS`` is the number of kills; `make crash` sets it to 5,000.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import time
from collections import Counter
from pathlib import Path

import pytest

from tests.crash.worker import AGAIN, NAMES
from tests.evidence import check_registered
from tests.testbed.processes import OWN_BIN, Process, rows, wait_until

ROUNDS = int(os.environ.get("SOCS_MONITOR_CRASH_ROUNDS", "100"))

# Seconds for which a child lives: some die while they start, some live until files were re-checked.
LIVES = ((0.0, 0.03), (0.0, 0.15), (0.03, 0.15), (0.3, 0.6))


class Worker(Process):
    """The worker process, and what its children reported.

    Attributes:
        acknowledged: Files whose registration was acknowledged.
        unsure: Files of these that were being changed when the child died.
        late: Files that were announced, or nearly so, before they existed.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__([OWN_BIN / "python", "-m", "tests.crash.worker", folder], folder / "worker.log")
        self.acknowledged: set[str] = set()
        self.late: set[str] = set()
        self.unsure: set[str] = set()
        self.deaths = 0
        self._child: int | None = None

    def read(self) -> None:
        for line in self.new_lines():
            what, _, argument = line.partition(" ")
            if what == "begin":
                self._child = int(argument)
            elif what == "died":
                self._child = None
                self.deaths += 1
            elif what == "late":
                self.late.add(argument)
            elif what == "change":
                self.unsure.add(argument)
            else:
                assert what == "ack", f"{line}\n{self.log[-3000:]}"
                self.acknowledged.add(argument)
                self.unsure.discard(argument)

    def child(self) -> int | None:
        """Return the process id of the living child."""
        self.read()
        return self._child

    def kill_child(self, after_s: float) -> None:
        """Kill the next child after some time, read its report, and write the files that it still had to write."""
        child = self.wait_for(self.child, 20, "began")
        time.sleep(after_s)  # the random moment of its death
        deaths = self.deaths
        os.kill(child, signal.SIGKILL)
        self.wait_for(lambda: (self.read(), self.deaths > deaths)[1], 20, "was killed")
        while self.late:
            with contextlib.suppress(FileExistsError), open(self.late.pop(), "xb") as file:
                file.write(b"written by another process, since its sender died")


@pytest.mark.timeout(120 + ROUNDS)
def test_acknowledged_files_are_registered_once(tmp_path: Path) -> None:
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    chance = random.Random(seed)
    with Worker(tmp_path) as worker:
        for round_ in range(ROUNDS):
            worker.kill_child(chance.uniform(*chance.choice(LIVES)))
            if round_ % 20 == 0:
                times = Counter(row["local_path"] for row in rows(tmp_path / "suprsync.db"))
                assert set(times.values()) <= {1}
        (tmp_path / AGAIN).touch()
        worker.kill_child(0.0)
        (tmp_path / "names.new").write_text("\n".join(os.path.basename(path) for path in worker.unsure))
        (tmp_path / "names.new").rename(tmp_path / NAMES)
        wait_until(lambda: worker.exit_code is not None, 90, "all files are registered")
        worker.read()
        assert worker.exit_code == 0, worker.log[-3000:]

    print(f"{len(worker.acknowledged)} files, {worker.deaths} deaths")
    assert len(worker.acknowledged) > 3 * ROUNDS
    everything = map(str, (tmp_path / "files").iterdir())
    check_registered(tmp_path / "suprsync.db", worker.acknowledged, among=everything)
