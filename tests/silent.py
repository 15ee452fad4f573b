"""Stand-in for a router whose agents never answer, a state that a real router cannot be put into at will."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class _Handler(BaseHTTPRequestHandler):
    """Accept every call, and never reply."""

    def do_GET(self) -> None:
        self.send_error(405)

    def do_POST(self) -> None:
        self.rfile.read()  # blocks until the caller gives up

    def log_message(self, *_: object) -> None:
        pass


@contextlib.contextmanager
def silent_router() -> Iterator[int]:
    """Run the stand-in, and provide its port."""
    with ThreadingHTTPServer(("127.0.0.1", 0), _Handler) as server:
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield server.server_port
        finally:
            server.shutdown()
            thread.join()
