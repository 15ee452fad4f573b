"""The fuzz targets: the parser, and a whole monitor that is constructed by hand."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import cbor2
from hypothesis import strategies as st
from ocs.ocs_feed import Feed

from socs_monitor.agent import PysmurfMonitor
from socs_monitor.wire import messages
from socs_monitor.wire.messages import MessageError
from tests import hostile
from tests.strategies import json_values, nasty_text
from tests.testbed.processes import rows

ADDRESS = ("127.0.0.1", 40000)
REASONS = {hostile.EMPTY, hostile.NOT_JSON, hostile.WRONG}

# Datagrams that once did harm.
CORPUS = Path(__file__).parent / "corpus"

# Placeholder for the folder of the files, in drawn datagrams.
FOLDER = "/FOLDER"

_NAMES = ("x.txt", "y.npy", "y", "fifo", "folder", "link", "..", "none", "a/b/z.g3", "a/../x.txt")


def datagrams() -> st.SearchStrategy[bytes]:
    """Draw real messages, whole or damaged in every way, and arbitrary bytes."""
    paths = st.sampled_from(_NAMES).map(lambda name: f"{FOLDER}/{name}")
    envelopes = st.sampled_from(hostile.envelopes(f"{FOLDER}/x.txt"))
    values = json_values() | st.sampled_from(hostile.ODD_VALUES) | paths | nasty_text()
    odd = st.builds(_replace, envelopes, st.sampled_from(("envelope", "payload")), st.integers(0, 9), values)
    files = st.sampled_from(registrations())
    odd_files = st.builds(_replace, files, st.sampled_from(("envelope", "payload")), st.integers(0, 9), values)
    whole = (envelopes | odd | files | odd_files).map(_encode)
    known = st.sampled_from([path.read_bytes() for path in sorted(CORPUS.iterdir())])
    return st.one_of(
        whole,
        st.builds(_splice, whole, st.integers(0, 400), st.integers(0, 20), st.binary(max_size=8)),
        st.sampled_from([datagram for datagram, _ in hostile.damaged()]),
        json_values().map(lambda value: json.dumps(value).encode()),
        st.binary(max_size=60),
        known,
    )


def _replace(envelope: dict[str, Any], where: str, index: int, value: Any) -> dict[str, Any]:
    """Replace one field's value, or remove the field."""
    inner = envelope["payload"] if where == "payload" else envelope
    if not isinstance(inner, dict) or not inner:
        return {**envelope, "payload": value}
    changed = {**inner}
    key = sorted(changed)[index % len(changed)]
    if value == "":
        del changed[key]
    else:
        changed[key] = value
    return {**envelope, "payload": changed} if inner is not envelope else changed


def registrations() -> list[dict[str, Any]]:
    """Return well-formed registrations of everything in the folder of files."""
    return [
        {**envelope, "payload": {**envelope["payload"], "path": f"{FOLDER}/{name}"}}
        for envelope in hostile.envelopes()
        if "_file" in envelope["type"]
        for name in _NAMES
    ]


def _encode(envelope: dict[str, Any]) -> bytes:
    return json.dumps(envelope).encode()


def _splice(datagram: bytes, at: int, length: int, insert: bytes) -> bytes:
    return datagram[:at] + insert + datagram[at + length :]


def check_parse(datagram: bytes) -> None:
    """Check that a datagram is one message, also as text, or one error with a known reason."""
    try:
        message = messages.parse(datagram)
    except MessageError as error:
        assert error.reason in REASONS, error  # noqa: PT017 (an error is a valid result)
        return
    assert type(message) in messages.Message.__args__
    assert {"type", "payload"} <= message.envelope.keys()
    assert repr(messages.parse(datagram.decode(errors="surrogatepass"))) == repr(message)
    if isinstance(message, messages.FileMessage):
        message.text.encode()  # the spool can hold it
        assert repr(messages.parse_file(message.text).meta) == repr(message.meta)


class StubAgent:
    """Stand-in for the parts of OCSAgent that the feeds use. It refuses what OCS or the router would refuse."""

    def __init__(self) -> None:
        self.log = MagicMock()
        self.realm_joined = True
        self.feeds: dict[str, SimpleNamespace] = {}

    def register_feed(self, name: str, **_: Any) -> SimpleNamespace:
        assert name.replace("-", "").replace("_", "").isalnum(), name
        self.feeds[name] = SimpleNamespace(feed_name=name, buffer_start_time=None, blocks={})
        return self.feeds[name]

    def publish_to_feed(self, name: str, message: Any, **_: Any) -> None:
        cbor2.dumps(message)
        if name.endswith("_meta"):
            for field, value in message["data"].items():
                Feed.verify_data_field_string(field)
                Feed.verify_message_data_type(value)
                assert not isinstance(value, list)
                assert message["block_name"] == field


def check_monitor(batch: Sequence[bytes]) -> dict[str, Any]:
    """Check that a monitor accepts any datagrams, accounts for all of them, and writes no harmful row.

    Returns the counts of files in its session data.
    """
    folder = tempfile.mkdtemp(prefix="fuzz-")
    try:
        return _check_monitor(
            [datagram.replace(FOLDER.encode(), f"{folder}/data".encode()) for datagram in batch], folder
        )
    finally:
        shutil.rmtree(folder)


def _check_monitor(batch: Sequence[bytes], folder: str) -> dict[str, Any]:
    data = Path(folder) / "data"
    (data / "a" / "b").mkdir(parents=True)
    (data / "folder").mkdir()
    for name in ("x.txt", "y.npy", "a/b/z.g3"):
        (data / name).write_text(name)
    os.mkfifo(data / "fifo")
    (data / "link").symlink_to("/etc/passwd")
    args = Namespace(
        db_path=f"{folder}/suprsync.db",
        udp_port=0,
        create_table=True,
        echo_sql=False,
        test_mode=False,
        data_root=[data],
    )
    monitor = PysmurfMonitor(StubAgent(), args)
    session = MagicMock()
    try:
        for datagram in batch:
            monitor.datagramReceived(datagram, ADDRESS)
        ok, text = monitor.run(session, {"test_mode": True})
        reasons = [letter.reason for letter in monitor._spool.dead()]
    finally:
        monitor._intake.close()
    assert ok, text
    assert not [reason for reason in reasons if "unexpected" in reason]
    for level in ("error", "failure", "critical"):  # refused registrations are warnings
        assert not getattr(monitor.log, level).called, getattr(monitor.log, level).call_args
    shown = session.data
    files: dict[str, Any] = shown["files"]
    assert shown["datagrams"]["total"] + sum(shown["malformed"].values()) == len(batch)
    assert shown["datagrams"]["total"] == sum(shown["datagrams"]["by_type"].values())
    assert files["received"] == sum(files[key] for key in ("registered", "pending", "waiting", "dead", "discarded"))
    assert files["received"] == sum(shown["datagrams"]["by_type"].get(kind, 0) for kind in messages.FILE_TYPES)
    assert files["pending"] == 0
    assert shown["degraded"] == {}
    assert set(shown["malformed"]) <= REASONS
    assert len(json.dumps(shown)) < 100_000
    for row in rows(args.db_path):
        assert not {"", ".", ".."} & set(row["remote_path"].split("/")), row
        assert os.path.realpath(row["local_path"]).startswith(f"{data}/"), row
        assert row["archive_name"] in ("smurf", "timestreams"), row
    return files
