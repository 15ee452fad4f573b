"""A monitor without OCS that is killed again and again, and reports what it did.

``python -m tests.crash.worker FOLDER`` forks one child after the other, so that each starts within milliseconds. A
child is both sender and monitor, and runs until it is killed. It reports on standard output, and hands each line to the
kernel before it does anything else::

    begin PID     a child has begun
    late PATH     it is about to register a file that does not exist
    change PATH   it is about to change a file that is registered
    ack PATH      the registration of a file is acknowledged, its change done
    died PID      it was killed; its whole report is above

Once FOLDER/again exists, a child waits for FOLDER/names, registers the files that it lists, one a line, waits until all
files are re-checked, and ends. The worker ends with it.
"""

from __future__ import annotations

import itertools
import os
import random
import sys
import threading
import time
from pathlib import Path

from socs_monitor.registration.lookup import Policy
from socs_monitor.registration.workers import SMALL
from tests.chain import Chain
from tests.testbed.processes import wait_until

SETTLE_S = 0.3

AGAIN = "again"
NAMES = "names"


def say(*words: object) -> None:
    os.write(1, (" ".join(map(str, words)) + "\n").encode())


class Child:
    """A sender and a monitor in one process."""

    def __init__(self, folder: Path) -> None:
        self.random = random.Random(os.getpid())
        # reserving disk space takes longer than most children live, so only some do it, and die meanwhile
        limits = {} if self.random.random() < 0.2 else {"reserve": 0}
        self.chain = Chain(folder, policy=Policy(settle_after=SETTLE_S), threads=True, **limits)
        self.chain.intake.start()
        self.thread = threading.Thread(target=self.chain.registrar.run, daemon=True)
        self.thread.start()

    def register(self, name: str) -> None:
        self.chain.accept(name)
        self.chain.intake.flush()
        say("ack", self.chain.path(name))

    def content(self) -> bytes:
        return self.random.randbytes(SMALL + 1 if self.random.random() < 0.1 else 100)

    def send_for_ever(self) -> None:
        ways = [self.plain, self.plain, self.late, self.growing, self.overwritten]
        for number in itertools.count():
            self.random.choice(ways)(f"{os.getpid()}-{number}.dat")
            if self.random.random() < 0.3:
                time.sleep(self.random.random() * 0.01)  # random pacing

    def plain(self, name: str) -> None:
        self.chain.write(name, self.content())
        self.register(name)

    def late(self, name: str) -> None:
        say("late", self.chain.path(name))
        self.register(name)
        self.chain.write(name, self.content())

    def growing(self, name: str) -> None:
        begin = time.monotonic()
        self.plain(name)
        time.sleep(self.random.random() * SETTLE_S / 6)  # a random moment: its row is written, or not yet
        say("change", self.chain.path(name))
        self.chain.write(name, self.content() * 2)
        if time.monotonic() < begin + SETTLE_S / 2:  # a later change may come after the re-check
            say("ack", self.chain.path(name))

    def overwritten(self, name: str) -> None:
        self.plain(name)
        say("change", self.chain.path(name))
        self.chain.write(name, self.content())
        self.register(name)

    def finish(self, names: Path) -> None:
        wait_until(names.exists, 60, "the names are written")
        for name in names.read_text().split():
            self.register(name)
        spool = self.chain.spool
        wait_until(lambda: spool.counts["received"] == spool.counts["settled"], 60, "all files are re-checked")
        self.chain.registrar.stop()
        self.thread.join()
        self.chain.intake.close()


def main(folder: Path) -> None:
    while True:
        pid = os.fork()
        if pid == 0:
            child = Child(folder)
            if (folder / AGAIN).exists():
                child.finish(folder / NAMES)
            else:
                child.send_for_ever()
            os._exit(0)
        say("begin", pid)
        _, status = os.waitpid(pid, 0)
        say("died", pid)
        if os.WIFEXITED(status):
            sys.exit(os.WEXITSTATUS(status))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
