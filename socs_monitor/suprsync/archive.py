"""The place of a file in the archive, and whether SupRsync may delete the local file afterwards.

Pure: reads no disk. The layout is the documented one. The rule about deletion is the published agent's, except that
only real timestream paths are deletable as timestreams. No remote path leaves the archive or means anything to a shell.
"""

from __future__ import annotations

import os.path
import re
import unicodedata
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

Meta = Mapping[str, Any]

# Linux reads these as one slash. ".." is not resolved, because only the file system knows where a link leads.
_SLASHES = re.compile(r"/(?:\.?/)+")

SMURF = "smurf"
TIMESTREAMS = "timestreams"

_NPY = ".npy"
_NAME_MAX = 255  # bytes of a file name that Linux file systems allow
_PATH_MAX = 4096  # bytes of a path that Linux allows, including the NUL at its end
# SupRsync passes remote paths to a shell on the archive host (`ssh host md5sum ...`), and splits the output of md5sum
# at white space. Letters, marks, digits (Unicode categories L, M and N) and these characters mean nothing to either.
_HARMLESS = "._-+=@,:%"
# Accepts nearly every valid path with one match: in ASCII, with no long component and none that begins with . or -
_PART = r"[0-9A-Za-z_+=@,:%][0-9A-Za-z._+=@,:%-]{0,63}"
_SAFE_PATH = re.compile(f"(?:{_PART}/)*{_PART}")
# Files whose paths contain one of these stay on the server, even in a dated folder.
_SEMI_PERMANENT = ("iv", "channel_assignment", "tune")

_ADVICE = (
    f"Remote paths may contain letters, digits and {_HARMLESS} only, because SupRsync passes them to a shell on the "
    "archive host. Rename the file, or change the sender's id or action, and announce it again: socs-monitor send"
)


class ArchiveError(ValueError):
    """The registration can never become a row, because its file has no safe place in the archive."""


class Entry(NamedTuple):
    """A file as SupRsync knows it. The first three fields are its key.

    Attributes:
        archive_name: ``smurf`` or ``timestreams``.
        local_path: Absolute and collapsed.
        remote_path: Relative to SupRsync's base directory.
        deletable: Whether SupRsync may delete the local file once it is archived.
    """

    archive_name: str
    local_path: str
    remote_path: str
    deletable: bool


def collapse(path: str) -> str:
    """Replace ``//`` and ``/./`` in a path with ``/``, so that a file has one spelling."""
    return _SLASHES.sub("/", path) if "//" in path or "/./" in path else path


def create_remote_path(meta: Meta, archive_name: str) -> str:
    """Create the "remote path" of a file, relative to SupRsync's base directory.

    For pysmurf ancillary files (archive ``smurf``) it is generated from the action and its timestamp::

        <5 ctime digits>/<pub_id>/<action_timestamp>_<action>/<plots or outputs>/<file name>

    For ``timestreams`` it is the path relative to the g3 folder, that is, its last three components.

    Args:
        meta (dict): The payload of the registration, with the publisher's id as ``pub_id``. The path is created from
            ``path`` and, for ``smurf``, ``timestamp`` (unix seconds), ``action``, ``action_ts`` and ``plot``.
        archive_name (str): ``smurf`` or ``timestreams``.

    Returns:
        str: The path. It is never absolute and never leaves the base directory.

    Raises:
        ArchiveError: If the archive is unknown, or a component of the path would not be safe.
    """
    return _remote_path(meta, archive_name, meta["path"])


def _remote_path(meta: Meta, archive_name: str, path: str) -> str:
    name = path.rpartition("/")[2]
    if archive_name == SMURF:
        action, action_ts = meta.get("action"), meta.get("action_ts")
        if action in (".", "..") or action_ts in (".", ".."):
            raise ArchiveError(f"{action!r} of action {action_ts!r} is not a safe path component")
        if "timestamp" not in meta:  # as in a g3_file message that names this archive
            raise ArchiveError("no timestamp, which the archive smurf needs")
        parts = [
            str(meta["timestamp"])[:5],
            meta["pub_id"],
            f"{action_ts}_{action}",
            "plots" if meta.get("plot") else "outputs",
            name,
        ]
    elif archive_name == TIMESTREAMS:
        _check_name(name)  # normpath would drop a bad one
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
    _check_name(part)
    if part.startswith("-"):
        raise ArchiveError(f"'-' is not allowed at the beginning of {_quote(part)}. {_ADVICE}")
    for character in part:
        if character not in _HARMLESS and unicodedata.category(character)[0] not in "LMN":
            name = unicodedata.name(character, f"U+{ord(character):04X}")
            raise ArchiveError(f"{character!r} ({name}) is not allowed in {_quote(part)}. {_ADVICE}")
    if len(part.encode()) > _NAME_MAX:
        raise ArchiveError(f"path component of more than {_NAME_MAX} bytes: {_quote(part)}")


def _check_name(part: str) -> None:
    if part in ("", ".", "..") or "/" in part:
        raise ArchiveError(f"{part!r} is not a safe path component")


def _quote(part: str) -> str:
    return repr(part if len(part) <= 40 else part[:40] + "...")


def is_deletable(local_path: str, archive_name: str) -> bool:
    """Whether SupRsync may delete the local file once it is archived.

    A timestream is deletable only at ``.../<5 digits>/<stream>/<name>.g3``. A ``smurf`` file is deletable only below a
    dated folder (``/data/smurf_data/<digits>/...``), and only if it is not an IV, channel assignment or tune file, as
    with the published agent. A path with ``..`` may lead elsewhere, so it is never deletable.
    """
    if "/../" in local_path:
        return False
    if archive_name != SMURF:
        *_, timecode, stream, name = ("", "", *local_path.rsplit("/", 3))
        return len(timecode) == 5 and _is_number(timecode) and stream != "" and name[1:].endswith(".g3")
    components = local_path.split("/", 4)
    dated = len(components) > 3 and _is_number(components[3])
    return dated and not any(key in local_path for key in _SEMI_PERMANENT)


def _is_number(component: str) -> bool:
    return component.isascii() and component.isdigit()


def candidates(meta: Meta) -> Iterator[Entry]:
    """Yield the entries that a registration may mean. The first one whose file exists is registered.

    There can be two, because ``numpy.save`` appends ``.npy`` to file names and senders often leave it out. A name that
    no file system allows is skipped.

    Raises:
        ArchiveError: If the registration can never become a row.
    """
    path = collapse(meta["path"])
    for field in ("archive_name", "timestamp", "action", "action_ts"):
        if isinstance(meta.get(field), (list, dict)):
            raise ArchiveError(f"{field} is a {type(meta[field]).__name__}: expected text or a number")
    if not path.startswith("/"):
        raise ArchiveError(f"path {path!r} is not absolute: only its sender knows the working directory")
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
        raise ArchiveError(f"{error.object!r} is not valid Unicode: it contains a lone surrogate") from None


def _may_exist(path: str) -> bool:
    """Whether Linux allows the length of a path and of its last component."""
    encoded = path.encode()
    return len(encoded) < _PATH_MAX and len(encoded.rpartition(b"/")[2]) <= _NAME_MAX
