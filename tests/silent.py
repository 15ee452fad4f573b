"""Stand-ins for a router in states in which a real one cannot be brought at will: it answers, its agents never do."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class _Handler(BaseHTTPRequestHandler):
    """Answers while the agent behind it does not: no call ever has a reply."""

    def do_GET(self) -> None:
        self.send_error(405)

    def do_POST(self) -> None:
        self.rfile.read()  # until the caller gives up

    def log_message(self, *_: object) -> None:
        pass


@contextlib.contextmanager
def silent_router() -> Iterator[int]:
    """Run such a router; gives its port."""
    with ThreadingHTTPServer(("127.0.0.1", 0), _Handler) as server:
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield server.server_port
        finally:
            server.shutdown()
            thread.join()
