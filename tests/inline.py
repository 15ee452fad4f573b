"""Workers without threads: small tasks are done when they are submitted, large files when a test calls `hash_large`."""

from __future__ import annotations

import queue
from collections.abc import Callable, Sequence

from socs_monitor.registration.lookup import Policy
from socs_monitor.registration.parking import Parking
from socs_monitor.registration.work import Result, Task
from socs_monitor.registration.workers import Workers


class InlineWorkers(Workers):
    """The real workers, run by the calling thread."""

    def __init__(self, policy: Policy, parking: Parking, wake: Callable[[], None], small: int) -> None:
        super().__init__(policy, parking, wake, spawn=lambda work, name: None, small=small)

    def submit(self, tasks: Sequence[Task], deliver: Callable[[list[Result]], None] | None = None) -> None:
        super().submit(tasks, deliver)
        while True:
            try:
                batch = self._batches.get_nowait()
            except queue.Empty:
                return
            if batch is not None:
                self._do(self._workers[0], batch)

    def hash_large(self) -> None:
        """Hash all pending large files."""
        while not self._readings.empty():
            _, _, reading = self._readings.get()
            assert reading is not None
            self._read_slice(self._workers[1], reading)
