"""The tasks of the workers, and their results: plain data between `registrar` and `workers`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeAlias

from socs_monitor.registration.checksum import FileRefusedError
from socs_monitor.registration.parking import HungError
from socs_monitor.spool.records import Registration
from socs_monitor.spool.states import Event, State
from socs_monitor.suprsync.archive import ArchiveError
from socs_monitor.suprsync.upsert import HashedFile
from socs_monitor.wire.text import sanitize


class Hashed(NamedTuple):
    """A registration whose file was found and hashed; `fingerprint` is from before it was read."""

    registration: Registration
    file: HashedFile
    fingerprint: int


class Failed(NamedTuple):
    """A registration whose file could not be hashed.

    Attributes:
        registration: The registration.
        reason: The reason, as shown to people.
        refused: Whether the registration can never become a row.
        withdraw: Whether it is refused because of what its path leads to now. A row of it must be withdrawn then.
        origin: Its state; only refused ones may be REGISTERED.
    """

    registration: Registration
    reason: str
    refused: bool = False
    withdraw: bool = False
    origin: State = State.PENDING


class HashedLarge(NamedTuple):
    """A large file that was hashed for the registrations `ids`."""

    ids: Sequence[int]
    path: str
    md5: str
    fingerprint: int


class FailedLarge(NamedTuple):
    """A large file that could not be hashed for the registrations `ids`: a `Failed` for each of them.

    Attributes:
        ids: The registrations.
        reason: The reason, as shown to people.
        refused: Whether they can never become rows.
        missing: Whether the reason is that there is no such file.
    """

    ids: Sequence[int]
    reason: str
    refused: bool = False
    missing: bool = False


class Recheck(NamedTuple):
    """A registered file, and the task to check it again.

    Attributes:
        id: The registration.
        path: The file.
        fingerprint: The fingerprint from before it was hashed.
        before: Earlier registrations of its path, which settle together with this one.
    """

    id: int
    path: str
    fingerprint: int
    before: tuple[int, ...] = ()


class Rechecked(NamedTuple):
    """The result of a re-check: UNCHANGED, CHANGED, MISSING, UNREADABLE or, with a reason, REFUSED.

    RESTARTED means that a former run registered the file, so that only its id is known.
    """

    task: Recheck
    event: Event
    reason: str = ""


# A `Hashed` as a task: make sure that the file has not changed. The result is the task, or a `Failed`.
Task: TypeAlias = Registration | Hashed | Recheck
Result: TypeAlias = Hashed | HashedLarge | Failed | FailedLarge | Rechecked
HashResult: TypeAlias = HashedLarge | FailedLarge
Deliver: TypeAlias = Callable[[HashResult], None]


def path_of(task: Task) -> str:
    """Return the path of a task."""
    if isinstance(task, Registration):
        return str(task["path"])
    return task.file.entry.local_path if isinstance(task, Hashed) else task.path


def fail(task: Task, error: Exception) -> Failed | Rechecked:
    """Return the result of a task that raised an error."""
    reason, refused, missing = _explain(path_of(task), error)
    if isinstance(task, Recheck):
        return Rechecked(task, Event.MISSING if missing else Event.REFUSED if refused else Event.UNREADABLE, reason)
    if isinstance(task, Hashed):
        return Failed(task.registration, reason)
    return Failed(task, reason, refused, withdraw=isinstance(error, FileRefusedError))


def fail_large(path: str, error: Exception) -> FailedLarge:
    """Return the result of a large file whose hashing raised an error."""
    return FailedLarge((), *_explain(path, error))


def _explain(path: str, error: Exception) -> tuple[str, bool, bool]:
    """Return the reason of a failure, whether it is final, and whether the file is missing."""
    if isinstance(error, (ArchiveError, FileRefusedError)):
        return sanitize(str(error)), True, False
    if isinstance(error, HungError):
        return str(error), False, False
    if isinstance(error, OSError):
        missing = isinstance(error, (FileNotFoundError, NotADirectoryError))
        return sanitize(f"{path}: {error.strerror or error}"), False, missing
    return sanitize(f"{path}: unexpected error {error!r}. Please report it"), False, False


def ids_of(result: Result) -> Sequence[int]:
    """Return the registrations that a result is about."""
    if isinstance(result, (HashedLarge, FailedLarge)):
        return result.ids
    return (result.task.id if isinstance(result, Rechecked) else result.registration.id,)


def split(result: Result) -> list[Result]:
    """Return a result per registration."""
    if isinstance(result, (HashedLarge, FailedLarge)):
        return [result._replace(ids=(id_,)) for id_ in result.ids]
    return [result]
