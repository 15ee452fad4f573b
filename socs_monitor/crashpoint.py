"""Named points at which a test can have this process killed, to see that what was acknowledged survives.

The environment variable ``SOCS_MONITOR_CRASH`` names one; the process then kills itself there with SIGKILL.
Unset, as it is in use, a point is one comparison.
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
