"""Docker's question: does this container take registrations and write them down?

Exit code 0 is yes; the line that is printed shows in `docker inspect`. Asked are

* the kernel: does the agent hold a UDP socket? Without one it lives on and hears nothing;
* the agent, by way of the router: is `run` running, and not degraded?

A router that is away is no fault of this container: files are taken and registered without it, and a restart,
which is what "unhealthy" asks for, would help nothing. Then the kernel's answer alone counts. A router that
answers while the agent does not is a fault.
"""

import os
import signal
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from ocs.client_http import ControlClientError
from ocs.ocs_client import OCSClient

ROUTER_S = 3.0  # to answer at all
AGENT_S = 6  # to answer through the router; OCS's client itself would wait for ever

UNCONNECTED = "07"  # the state of a listening UDP socket in /proc/net/udp; a DNS query's socket is connected


class NoAnswerError(Exception):
    """Nobody answered in time. No OSError: those the HTTP library takes for its own."""


def agent_listens() -> bool:
    """Whether a child of process 1, which is dumb-init, has a UDP socket that waits for datagrams."""
    listening = set()
    for table in Path("/proc/net").glob("udp*"):
        rows = [line.split() for line in table.read_text().splitlines()[1:]]
        listening |= {f"socket:[{row[9]}]" for row in rows if row[3] == UNCONNECTED}
    return not listening.isdisjoint(files_of_the_agent())


def files_of_the_agent() -> Iterator[str]:
    """What the children of process 1 have open; processes end and files are closed while we look."""
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            if stat.read_text().rpartition(")")[2].split()[1] == "1":
                for descriptor in os.listdir(stat.parent / "fd"):
                    with suppress(FileNotFoundError):
                        yield os.readlink(stat.parent / "fd" / descriptor)


def router_answers(url: str) -> bool:
    """Whether an HTTP server answers there; it need not like the question."""
    try:
        urllib.request.urlopen(url, timeout=ROUTER_S).close()  # noqa: S310 - the address is the site's own
    except urllib.error.HTTPError:
        return True
    except OSError:
        return False
    return True


def fault_of_run(instance_id: str, url: str) -> str | None:
    """Ask the agent about `run`.

    Returns:
        What is wrong, or None.
    """
    signal.alarm(AGENT_S)
    try:
        _, _, session = OCSClient(instance_id, args=["--site-http", url]).run.status()
    except NoAnswerError:
        return f"the agent does not answer within {AGENT_S} s, though the router does"
    except ControlClientError as error:
        return f"the agent cannot be reached, though the router answers: {error}"
    finally:
        signal.alarm(0)
    if session.get("status") != "running":
        return f"'run' is {session.get('status', 'not started')}: start it, or restart the agent"
    if session.get("degraded"):
        return "'run' is degraded: the agent's log says why"
    return None


def on_alarm(_signal: int, _frame: object) -> None:
    """Break off a question that nobody answers."""
    raise NoAnswerError


def main() -> int:
    """Print the state and give the exit code."""
    signal.signal(signal.SIGALRM, on_alarm)
    url = os.environ["SITE_HTTP"]
    if not agent_listens():
        state, code = "unhealthy: the agent has no UDP port open, so nothing is received: see its log", 1
    elif not router_answers(url):
        state, code = f"healthy: the agent listens; the router at {url} does not answer, so no more is known", 0
    elif fault := fault_of_run(os.environ["INSTANCE_ID"], url):
        state, code = f"unhealthy: {fault}", 1
    else:
        state, code = "healthy: 'run' is running", 0
    sys.stdout.write(state + "\n")
    return code


if __name__ == "__main__":
    sys.exit(main())
