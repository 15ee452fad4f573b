"""Where a registered file goes in the archive, and whether it may be deleted here afterwards.

Pure: reads no disk. The layout is the documentation's, the rule about deletion the published agent's.
"""

from __future__ import annotations

import os.path
import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

Meta = Mapping[str, Any]

SMURF = "smurf"
TIMESTREAMS = "timestreams"

_NPY = ".npy"
# Longest file name that Linux file systems take, in bytes.
_NAME_MAX = 255
# Bytes of a path that Linux takes, with the NUL at its end.
_PATH_MAX = 4096
# SupRsync reads a copy's sum off md5sum's output by white space, and md5sum escapes these others: a row with
# one of them can never be verified, and holds back `finalized_until` for ever (contract).
_UNVERIFIABLE = re.compile(r"[\s\\\x00-\x1f\x7f]")
# What passes all of `_check_component` at once, as nearly every path does: parts of printable ASCII without a
# backslash, none of which begins with a dot or is long.
_PART = r"[!-\-0-[\]-~][!-.0-[\]-~]{0,63}"
_SAFE_PATH = re.compile(f"(?:{_PART}/)*{_PART}")
# Files that stay on the server though they lie in a dated folder.
_SEMI_PERMANENT = ("iv", "channel_assignment", "tune")


class ArchiveError(ValueError):
    """The registration can never become a row: what it names has no safe place in the archive."""


class Entry(NamedTuple):
    """A file as SupRsync is to know it. Paths are str; `remote_path` is below SupRsync's base directory."""

    archive_name: str
    local_path: str
    remote_path: str
    deletable: bool


def create_remote_path(meta: Meta, archive_name: str) -> str:
    """Create the "remote path" of a file, relative to SupRsync's base directory.

    For pysmurf ancillary files (archive ``smurf``) it comes from the action and its timestamp::

        <5 ctime digits>/<pub_id>/<action_timestamp>_<action>/<plots or outputs>/<file name>

    For ``timestreams`` it is the path relative to the g3 folder: its last three components.

    Args:
        meta (dict): The payload of the registration, with the publisher's id as ``pub_id``. Of it are used
            ``path`` and, for ``smurf``, ``timestamp`` (unix seconds), ``action``, ``action_ts``, ``plot``.
        archive_name (str): ``smurf`` or ``timestreams``.

    Returns:
        str: The path. It never is absolute and never leaves the base directory.

    Raises:
        ArchiveError: If the archive is unknown, or a part of the path would not be one safe component.
    """
    return _remote_path(meta, archive_name, meta["path"])


def _remote_path(meta: Meta, archive_name: str, path: str) -> str:
    name = path.rpartition("/")[2]
    if archive_name == SMURF:
        action, action_ts = meta.get("action"), meta.get("action_ts")
        if action in (".", "..") or action_ts in (".", ".."):
            raise ArchiveError(f"{action!r} of action {action_ts!r} is not a safe path component")
        if "timestamp" not in meta:  # a g3_file message need not have one
            raise ArchiveError("no timestamp, which the archive smurf needs")
        parts = [
            str(meta["timestamp"])[:5],
            meta["pub_id"],
            f"{action_ts}_{action}",
            "plots" if meta.get("plot") else "outputs",
            name,
        ]
    elif archive_name == TIMESTREAMS:
        _check_component(name)  # which normpath would hide
        parts = os.path.normpath(path).split("/")[-3:]
        if len(parts) < 3:
            raise ArchiveError(f"timestream path {path!r} has fewer than three components")
    else:
        raise ArchiveError(f"unknown archive name {archive_name!r}: expected smurf or timestreams")
    remote_path = "/".join(parts)
    if not (_SAFE_PATH.fullmatch(remote_path) and remote_path.count("/") == len(parts) - 1):
        for part in parts:
            _check_component(part)
    return remote_path


def _check_component(part: str) -> None:
    if part in ("", ".", "..") or "/" in part:
        raise ArchiveError(f"{part!r} is not a safe path component")
    if _UNVERIFIABLE.search(part):
        raise ArchiveError(f"{part!r} has white space, a backslash or a control character: SupRsync cannot verify it")
    if len(part.encode()) > _NAME_MAX:
        raise ArchiveError(f"path component of more than {_NAME_MAX} bytes: {part[:40]!r}...")


def is_deletable(local_path: str, archive_name: str) -> bool:
    """Whether SupRsync may delete the local file once it is archived.

    Timestreams always; ``smurf`` files only below a dated folder (``/data/smurf_data/<digits>/...``) and only
    if they are no IV, channel assignment or tune file.
    """
    if archive_name != SMURF:
        return True
    components = local_path.split("/", 4)
    dated = len(components) > 3 and components[3].isascii() and components[3].isdigit()
    return dated and not any(key in local_path for key in _SEMI_PERMANENT)


def candidates(meta: Meta) -> Iterator[Entry]:
    """Yield the entries that a registration may mean; the first that exists on disk is the one.

    There can be two, since ``numpy.save`` appends ``.npy`` to a name and senders often leave it out.

    Raises:
        ArchiveError: If the registration can never become a row.
    """
    path = meta["path"]
    for field in ("archive_name", "timestamp", "action", "action_ts"):
        if isinstance(meta.get(field), (list, dict)):
            raise ArchiveError(f"{field} is a {type(meta[field]).__name__}: expected text or a number")
    if not path.startswith("/"):
        raise ArchiveError(f"path {path!r} is not absolute: only its sender knows where that is")
    archive_name = meta.get("archive_name", SMURF)
    paths: tuple[str, ...] = (path,)
    try:
        path.encode()
        if archive_name == SMURF and not path.endswith(_NPY) and _may_exist(path + _NPY):
            paths = (path + _NPY, path) if meta.get("format") in ("npy", "npyt") else (path, path + _NPY)
        for local_path in paths:
            remote_path = _remote_path(meta, archive_name, local_path)
            yield Entry(archive_name, local_path, remote_path, is_deletable(local_path, archive_name))
    except UnicodeEncodeError as error:
        raise ArchiveError(f"{error.object!r} is not valid Unicode: it has half of a surrogate pair") from None


def _may_exist(path: str) -> bool:
    """Whether Linux allows a file of this path at all: its name and it are not too long."""
    encoded = path.encode()
    return len(encoded) < _PATH_MAX and len(encoded.rpartition(b"/")[2]) <= _NAME_MAX
