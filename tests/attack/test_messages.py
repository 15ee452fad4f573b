"""Registrations in an unusual form: what the published agent registers is registered, and nothing disappears."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from ocs.ocs_client import OCSClient

from socs_monitor.wire.publisher import data_file, g3_file
from tests import hostile
from tests.integration.test_end_to_end import files
from tests.socs import server_root
from tests.testbed.processes import PEER_BIN, Agent

StartAgent = Callable[..., Agent]

MISSING = object()

# A remote path that nobody has a reason to refuse, in either archive.
_PART = "[A-Za-z0-9._+][A-Za-z0-9._+-]{0,254}"
PLAIN = re.compile(f"({_PART}/){{4}}{_PART}|({_PART}/){{2}}{_PART}")

# What the published agent formats as text, and whose result is not a path component that anybody can archive.
ODD: list[Any] = [None, True, False, 7, 0, -1, 2**70, 1.5, 1e300, float("nan"), float("inf"), "1.795e9", "", "x" * 300]
ODD += [[], [1, "a"], {}, {"a": 1}, "a b", "../..", "a/b"]
FIELDS = ("timestamp", "action", "action_ts", "format", "plot", "archive_name", "type", "pysmurf_version", "comment")
UNUSED = ("type", "pysmurf_version", "comment")
SURROGATE = "a\ud800b"  # half of a character: JSON can hold it, UTF-8 cannot


class Case(NamedTuple):
    """A datagram that registers a file, and that file's path."""

    name: str
    path: str
    datagram: bytes


class Maker:
    """Makes files below a folder, and their registrations."""

    def __init__(self, root: Path) -> None:
        self.folder = root / "20240105" / "crate1slot2" / "1704450000" / "outputs"
        self.folder.mkdir(parents=True)
        self._count = 0

    def path(self, suffix: str = ".txt") -> str:
        self._count += 1
        path = self.folder / f"{self._count:03}{suffix}"
        path.write_text(path.name)
        return str(path)

    def envelope(self, path: str, **payload: Any) -> dict[str, Any]:
        known = data_file(path, file_format="txt", timestamp=1704450002.75, action="take_iv", action_ts="1704450000")
        payload = {name: value for name, value in {**known, **payload}.items() if value is not MISSING}
        return {"host": "h", "id": "crate1slot2", "script": "s", "time": 1.5, "type": "data_file", "payload": payload}

    def cases(self) -> Iterator[Case]:
        for field in FIELDS:
            for value in (MISSING, *ODD, *([SURROGATE] if field in UNUSED else [])):
                path = self.path()
                yield self.case(f"{field} {value!r:.30}", self.envelope(path, **{field: value}))
        for key in ("id", "host", "script", "time", "seq_no"):
            for value in (MISSING, *ODD):
                for kind in ("data_file", "g3_file"):
                    envelope = {**self.envelope(self.path()), "type": kind, key: value}
                    if kind == "g3_file":
                        envelope["payload"] = g3_file(envelope["payload"]["path"])
                    envelope = {name: value for name, value in envelope.items() if value is not MISSING}
                    yield self.case(f"{kind} {key} {value!r:.30}", envelope)
        for file_format in ("npy", 1, ""):
            for made in (("",), (".npy",), ("", ".npy")):
                name = self.path("")
                (self.folder / name).unlink()
                for suffix in made:
                    Path(name + suffix).write_text(name + suffix)
                registered = name + (made[-1] if file_format == "npy" else made[0])
                yield self.case(f"{file_format!r} {made}", self.envelope(name, format=file_format), registered)
        yield from self.unusual_text()

    def unusual_text(self) -> Iterator[Case]:
        text = json.dumps(self.envelope(path := self.path())).encode()
        yield Case("BOM", path, b"\xef\xbb\xbf" + text)
        text = json.dumps(self.envelope(path := self.path(), comment="x")).encode()
        yield Case("surrogate", path, json.dumps(self.envelope(path, comment=SURROGATE)).encode())
        text = json.dumps(self.envelope(path := self.path(), comment="x")).encode()
        yield Case("surrogate as bytes", path, text.replace(b'"x"', b'"\xed\xa0\x80"'))
        text = json.dumps(self.envelope(path := self.path(), comment=0)).encode()
        yield Case("deep", path, text.replace(b'"comment": 0', b'"comment": ' + b"[" * 400 + b"]" * 400))
        text = json.dumps(self.envelope(path := self.path(), action="\N{ANGSTROM SIGN}"), ensure_ascii=False).encode()
        yield Case("raw UTF-8", path, text)

    def case(self, name: str, envelope: dict[str, Any], path: str = "") -> Case:
        return Case(name, path or envelope["payload"]["path"], json.dumps(envelope).encode())


@pytest.fixture
def maker() -> Iterator[Maker]:
    with server_root() as root:
        yield Maker(root)


def rows_of(monitor: Agent) -> dict[str, dict[str, Any]]:
    """What its database has of each path, but for when."""
    return {
        row["local_path"]: {name: row[name] for name in row if name not in ("id", "timestamp")}
        for row in monitor.rows()
    }


def taken(client: OCSClient) -> int:
    """How many registrations are rows or dead letters."""
    return sum(files(client).get(key, 0) for key in ("registered", "dead"))


def dead(client: OCSClient) -> dict[str, dict[str, Any]]:
    """The dead letters by path."""
    return {letter["path"]: letter for letter in client.list_failed().session["data"]["failed"]}


def test_a_readable_path_is_never_dropped_and_rows_equal_the_published_agents(agent: StartAgent, maker: Maker) -> None:
    cases = list(maker.cases())
    last = maker.case("last", maker.envelope(maker.path()))
    peer = agent(bin_dir=PEER_BIN)
    for case in (*cases, last):  # one by one, since its buffer is the kernel's default
        hostile.send(peer.udp_port, [case.datagram])
    peer.wait_for(lambda: last.path in rows_of(peer), 30, "registered the last one")
    theirs = rows_of(peer)
    peer.stop()

    own = agent()
    hostile.send(own.udp_port, [case.datagram for case in (*cases, last)])
    own.wait_for(lambda: last.path in rows_of(own), 30, "registered the last one")
    client = own.client()
    own.wait_for(lambda: taken(client) == len(cases) + 1, 30, "took all")
    ours, refused = rows_of(own), dead(client)

    for case in cases:
        theirs_of_it = theirs.get(case.path)
        if case.path in refused:
            assert refused[case.path]["refused"], case
            assert refused[case.path]["reason"], case
            assert theirs_of_it is None or not PLAIN.fullmatch(theirs_of_it["remote_path"]), case
        else:
            assert case.path in ours, f"disappeared: {case}"
            row = ours[case.path]
            if theirs_of_it is not None and row["archive_name"] == "timestreams" and not case.path.endswith(".g3"):
                theirs_of_it = {**theirs_of_it, "deletable": 0}  # the published agent lets SupRsync delete any file
            assert theirs_of_it in (None, row), case
    assert len(refused) < 70, "few: the rule for names refuses what is a list or has spaces"
    assert client.run.status().session["data"]["malformed"] == {}


def test_what_text_cannot_hold_ends_as_a_dead_letter_that_is_listed_also_after_a_restart(
    agent: StartAgent, maker: Maker
) -> None:
    folder = str(maker.folder)
    odd = [
        *(maker.envelope(maker.path(), **{field: SURROGATE}) for field in ("action", "action_ts", "timestamp")),
        {**maker.envelope(maker.path()), "id": SURROGATE},
        maker.envelope(f"{folder}/{SURROGATE}"),
        maker.envelope(f"{folder}/{SURROGATE}/x.npy"),
        {**maker.envelope(f"{folder}/{SURROGATE}/y/x.g3"), "type": "g3_file"},
        maker.envelope(f"{folder}/{SURROGATE}.g3", archive_name="timestreams"),
    ]
    monitor = agent()
    hostile.send(monitor.udp_port, (json.dumps(envelope).encode() for envelope in odd))
    client = monitor.client()
    monitor.wait_for(lambda: taken(client) == len(odd), 10, "refused all")
    letters = dead(client)
    assert {path.replace("\\ud800", "\ud800") for path in letters} == {each["payload"]["path"] for each in odd}
    assert all(letter["refused"] for letter in letters.values())
    assert "internal_error" not in str(letters)
    assert "Traceback" not in monitor.log
    monitor.stop()
    monitor.start()
    assert dead(monitor.client()) == letters
    assert "Traceback" not in monitor.log


def test_unusual_text_survives_the_spool_and_a_restart(agent: StartAgent, maker: Maker) -> None:
    datagrams = {case.path: case.datagram for case in maker.unusual_text()}
    for path in datagrams:
        Path(path).unlink()
    monitor = agent()
    hostile.send(monitor.udp_port, datagrams.values())
    client = monitor.client()
    monitor.wait_for(lambda: files(client).get("waiting") == len(datagrams), 10, "waits for the files")
    monitor.kill()
    for path in datagrams:
        Path(path).write_text(path)
    monitor.start()

    monitor.wait_for(lambda: len(monitor.rows()) == len(datagrams), 20, "registered all")
    assert rows_of(monitor).keys() == datagrams.keys()


def test_unusual_text_is_listed_as_a_dead_letter_after_a_restart(agent: StartAgent, maker: Maker) -> None:
    datagrams = {case.path: case.datagram for case in maker.unusual_text()}
    for path in datagrams:
        Path(path).unlink()
    monitor = agent(options=[["--give-up-after", 0.1]])
    hostile.send(monitor.udp_port, datagrams.values())
    client = monitor.client()
    monitor.wait_for(lambda: dead(client).keys() == datagrams.keys(), 10, "gave up all")
    monitor.kill()
    monitor.start()
    client = monitor.client()
    monitor.wait_for(lambda: dead(client).keys() == datagrams.keys(), 10, "lists them again")


@pytest.mark.parametrize("file_format", ["txt", "npy"])
@pytest.mark.parametrize("length", [251, 252, 255])
def test_a_late_file_with_a_long_name_is_waited_for(
    agent: StartAgent, maker: Maker, file_format: str, length: int
) -> None:
    path = str(maker.folder / ("x" * length))
    monitor = agent()
    hostile.send(monitor.udp_port, [json.dumps(maker.envelope(path, format=file_format)).encode()])
    client = monitor.client()
    monitor.wait_for(lambda: files(client).get("waiting") == 1, 10, "waits for the file")
    Path(path).write_text("late")

    monitor.wait_for(lambda: path in rows_of(monitor), 10, "registered it")
