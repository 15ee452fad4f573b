"""Threads that hash what is not small, while small files pass by.

Files up to `MEDIUM` bytes go before larger ones, also before the rest of one that is being read: between two chunks
of a large file its thread looks after one that is not. So nothing waits for seconds but what takes seconds itself.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from socs_monitor.checksum import StoppedError
from socs_monitor.finder import Hashed, Policy, look
from socs_monitor.spool import Failure, Registration

# Some ten milliseconds of hashing, bytes.
MEDIUM = 4 << 20


class Hashers:
    """The threads, as many as the policy says, and what came of their work. All but the threads is for one thread.

    Args:
        policy: How files are treated.
        stopped: Asked between two chunks whether to give up.
        finished: Called, by a thread, when nothing is left to hash.
    """

    def __init__(self, policy: Policy, stopped: Callable[[], bool], finished: Callable[[], None]) -> None:
        self._policy = policy
        self._stopped = stopped
        self._finished = finished
        self._threads = ThreadPoolExecutor(policy.hash_workers, thread_name_prefix="hash")
        self._medium: deque[Registration] = deque()
        self._results: deque[Hashed | Failure] = deque()
        self._ids: set[int] = set()

    def __len__(self) -> int:
        """Number of registrations that were added and not yet taken."""
        return len(self._ids)

    def add(self, registration: Registration) -> None:
        """Have a registration's file hashed, once, however often it is added meanwhile."""
        if registration.id not in self._ids:
            self._ids.add(registration.id)
            self._medium.append(registration)
            self._threads.submit(self._next)

    def take(self) -> list[Hashed | Failure]:
        """Return what was found since the last call."""
        results = [self._results.popleft() for _ in range(len(self._results))]
        self._ids.difference_update(result.registration.id for result in results)
        return results

    def close(self) -> None:
        """End the threads; those at work have to be told to stop."""
        self._threads.shutdown(cancel_futures=True)

    def _next(self) -> None:
        """Hash the next file, or leave it for later if it is large."""
        try:
            registration = self._medium.popleft()
        except IndexError:  # between two chunks of a large one it was looked after
            return
        if not self._look(registration, MEDIUM, self._stopped):
            self._threads.submit(self._look, registration, None, self._between_chunks)

    def _between_chunks(self) -> bool:
        if self._medium and not self._stopped():
            self._next()
        return self._stopped()

    def _look(self, registration: Registration, at_most: int | None, stopped: Callable[[], bool]) -> bool:
        """Hash a file; return whether that is done with, since it is not larger than `at_most` bytes."""
        try:
            found = look(registration, self._policy, at_most, stopped)
        except StoppedError:
            return True
        if found is None:
            return False
        self._results.append(found)
        if len(self._results) >= len(self._ids):
            self._finished()
        return True
