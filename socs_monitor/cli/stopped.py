"""The spool of an agent that does not run, for a command that changes it."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator

from socs_monitor.cli.shared import NotDoneError
from socs_monitor.spool.file import SpoolBusyError
from socs_monitor.spool.store import Spool


@contextlib.contextmanager
def spool_of_stopped_agent(path: str) -> Iterator[Spool | None]:
    """Open the spool, or yield None if the agent runs and has it."""
    if not os.path.exists(path):
        raise NotDoneError(f"there is no spool {path}: name the agent's with --spool-path, or its --db-path")
    owner = os.stat(path).st_uid
    if os.geteuid() not in (0, owner):
        raise NotDoneError(f"the spool {path} belongs to user {owner}: run this as that user (sudo -u '#{owner}' ...)")
    try:
        spool = Spool(path, lambda text: print(text, file=sys.stderr))
    except SpoolBusyError:
        yield None
        return
    try:
        yield spool
    finally:
        spool.close()
