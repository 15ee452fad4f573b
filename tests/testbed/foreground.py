"""`make run`: router and agent in the foreground, database under ./var, until Ctrl-C."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
import time

from tests.testbed.processes import CROSSBAR, OWN_BIN, ROOT, Agent, Process, Router, udp_port_is_open

ROUTER_PORT = 8001
UDP_PORT = 8200
VAR = ROOT / "var"


class EndedError(Exception):
    """One of the processes has ended by itself."""


def tcp_port_is_open(port: int) -> bool:
    """Whether somebody listens on the TCP port of the loopback."""
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
        return True
    return False


def follow(agent: Agent, *others: Process) -> None:
    """Print the agent's log as it grows; raises `EndedError` when a process ends."""
    while True:
        ended = [process for process in (agent, *others) if process.exit_code is not None]
        for line in agent.new_lines():
            print(line, flush=True)
        if ended:
            raise EndedError(f"the {ended[0]} has ended by itself; its log is {os.path.relpath(ended[0].log_path)}")
        time.sleep(0.2)


def main() -> int:
    """Run until Ctrl-C (or SIGTERM) and return the exit code."""
    for each in (signal.SIGINT, signal.SIGTERM):  # SIGINT too, since a shell's background jobs begin with it ignored
        signal.signal(each, signal.default_int_handler)
    problem = None
    if not CROSSBAR.exists():
        problem = "The router is not installed: start this with `make run`, which installs it."
    elif tcp_port_is_open(ROUTER_PORT):
        problem = f"TCP port {ROUTER_PORT} is in use: another router runs on this host. Stop it first."
    elif udp_port_is_open(UDP_PORT):
        problem = f"UDP port {UDP_PORT} is in use: another monitor runs on this host. Stop it first."
    if problem is not None:
        print(problem, file=sys.stderr)
        return 1
    try:
        print("Starting the router and the agent ...", flush=True)
        with Router(VAR, ROUTER_PORT) as router, Agent(VAR, router, udp_port=UDP_PORT) as agent:
            agent.wait_listening()
            send = os.path.relpath(OWN_BIN / "socs-monitor")
            print(
                f"Ready: send it a file with\n\n    {send} send README.md\n\n"
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
