"""`make run`: router and agent in the foreground, with the database in ./var, until Ctrl-C."""

from __future__ import annotations

import os
import signal
import sys
import time

from tests.testbed.ports import tcp_port_is_bound, udp_port_is_bound
from tests.testbed.processes import CROSSBAR, OWN_BIN, ROOT, Agent, Process, Router

ROUTER_PORT = 8001
UDP_PORT = 8200
VAR = ROOT / "var"
POLL_S = 0.2


class EndedError(Exception):
    """A process ended by itself."""


def follow(agent: Agent, *others: Process) -> None:
    """Print the agent's log as it grows, until a signal raises an exception.

    Raises:
        EndedError: If one of the processes ends.
    """
    while True:
        ended = [process for process in (agent, *others) if process.exit_code is not None]
        for line in agent.new_lines():
            print(line, flush=True)
        if ended:
            raise EndedError(f"the {ended[0]} has ended. Its log is {os.path.relpath(ended[0].log_path)}")
        time.sleep(POLL_S)  # pacing only


def obstacle() -> str | None:
    """Return why router and agent cannot run, and what to do; None if they can."""
    if not CROSSBAR.exists():
        return "The router is not installed. Install and start it with: make run"
    if tcp_port_is_bound(ROUTER_PORT):
        return f"TCP port {ROUTER_PORT} is in use: another router runs on this host. Stop it first."
    if udp_port_is_bound(UDP_PORT):
        return f"UDP port {UDP_PORT} is in use: another monitor runs on this host. Stop it first."
    return None


def main() -> int:
    """Run until Ctrl-C or SIGTERM, and return the exit code."""
    for number in (signal.SIGINT, signal.SIGTERM):  # a shell's background jobs start with SIGINT ignored
        signal.signal(number, signal.default_int_handler)
    if problem := obstacle():
        print(problem, file=sys.stderr)
        return 1
    try:
        print("Starting the router and the agent ...", flush=True)
        with Router(VAR, ROUTER_PORT) as router, Agent(VAR, router, udp_port=UDP_PORT) as agent:
            agent.wait_listening()
            send = os.path.relpath(OWN_BIN / "socs-monitor")
            print(
                f"Ready. Send a file with\n\n    {send} send README.md\n\n"
                f"and find its row in {os.path.relpath(agent.db_path)}. Ctrl-C stops both. The agent's log:\n",
                flush=True,
            )
            follow(agent, router)
    except KeyboardInterrupt:
        print("\nStopped.")
        return 0
    except (EndedError, AssertionError) as error:
        print(f"\nStopped: {error}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
