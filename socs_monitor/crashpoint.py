"""Named points at which a test can kill this process, to verify that acknowledged registrations survive.

The environment variable ``SOCS_MONITOR_CRASH`` names a point; the process kills itself there with SIGKILL. In normal
use it is unset, and a point costs one comparison.
"""

import os
import signal
from typing import Final

POINTS: Final = ("received", "spooled", "queued", "hashed", "inserted", "committed", "settling", "settled")

_CHOSEN: Final = os.environ.get("SOCS_MONITOR_CRASH")


def reach(point: str) -> None:
    """Die here if this is the chosen point (one of `POINTS`)."""
    if point == _CHOSEN:
        os.kill(os.getpid(), signal.SIGKILL)
