"""OCS's own readers of the recorded feeds survive every value that a sender can make up, and record what is of use."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import ocs
import pytest

from socs_monitor.wire.publisher import Publisher, metadata
from tests.downstream import InfluxDB, Reader, aggregator, read_g3
from tests.testbed.processes import Agent, Router, wait_until
from tests.testbed.smurf_server import REGISTERS
from tests.testbed.subscriber import Subscriber

StartAgent = Callable[..., Agent]

NAN, INF = float("nan"), float("inf")
LARGEST = 1.7976931348623157e308
LONG = "x" * 50_000

# A sample: feed, field, unix time, value.
Sample = tuple[str, str, float, Any]


class Register(NamedTuple):
    """A register: its path and field, and of each value that is sent what is to be recorded, None for nothing."""

    path: str
    field: str
    values: list[tuple[Any, Any]]


def same(*values: Any) -> list[tuple[Any, Any]]:
    return [(value, value) for value in values]


def dropped(*values: Any) -> list[tuple[Any, Any]]:
    return [(value, None) for value in values]


ODD = [
    Register(
        "AMCc.SOStream.open_g3stream",
        "AMCcSOStreamopen_g3stream",
        [*same(1, 0), (True, 1), ("1", 1), *dropped(None, "2.5", "x", [1], INF), ("2", 2), (-7, -7)],
    ),
    Register(
        "AMCc.temperature",
        "AMCctemperature",
        [
            *same(54.25, -0.5, 5e-324, LARGEST),
            *((17, 17.0), ("1e3", 1000.0), (True, 1.0)),
            *dropped(NAN, INF, -INF, None, "1e999", 2**60 + 1),
        ],
    ),
    Register("AMCc.flag", "AMCcflag", [*same(False, True), ("1", True), ("0", False), *dropped("2", "yes", None)]),
    Register(
        "AMCc.text",
        "AMCctext",
        [
            *same("obs", "a=b,c d", "", "é\u2028\U0001f600", "'", LONG),
            *((1, "1"), (1.5, "1.5"), (True, "True"), ('a "word"', "a 'word'"), ("two\nlines\r\n", "two lines  ")),
            *(
                ("back\\slash", "back/slash"),
                ("end\\", "end/"),
                ("tab\t NUL\0", "tab  NUL "),
                ('"', "'"),
                *dropped(None),
            ),
        ],
    ),
    Register(
        "AMCc.list",
        "AMCclist",
        [([1, 2], "[1,2]"), ([], "[]"), ([[1.5, None]], "[[1.5,null]]"), ({"a": [True]}, "{'a':[true]}"), (7, "7")],
    ),
    Register("AMCc.huge", "AMCchuge", [*same(2**63 - 1, 1 - 2**63), *dropped(2**63, -(2**70), 10**400, INF, "9" * 30)]),
    Register("AMCc.null_first", "AMCcnull_first", [*dropped(None, NAN), *same(5, 6)]),
    Register("AMCc.only_null", "AMCconly_null", dropped(None, NAN, INF)),
    Register("AMCc.Base[0].x y", "AMCcBase0x_y", same(1)),
    Register("AMCc.a.b", "AMCcab", same(1)),
    Register("AMCc.ab", "AMCcab_8d82718c", same("text")),  # two paths that OCS's rule maps to one name do not mix
    Register("AMCca.b", "AMCcab_2bbc86ea", same(0.5)),
    Register("", "invalid_field", same(1)),
    Register("1.2.3", "", dropped(1)),
    Register("time", "time_33607480", same(1)),  # which mean something else to InfluxDB
    Register("feed", "feed_c8bc2586", same("text")),
    Register("A" * 400, "A" * 255, same(1)),
    Register("A" * 600, "", dropped(1)),
    *(Register(path, "".join(c for c in path if c.isalnum() or c == "_"), same(v, v)) for path, v in REGISTERS.items()),
]


def send(monitor: Agent, stream_id: str, registers: list[Register]) -> list[Sample]:
    """Send every value of every register, the registers in turns; return what is to be recorded."""
    expected: list[Sample] = []
    with contextlib.closing(Publisher(f"STREAMER:{stream_id}", monitor.address)) as publisher:
        for turn in range(max(len(register.values) for register in registers)):
            for path, field, values in registers:
                if turn < len(values):
                    value, recorded = values[turn]
                    datagram = publisher.encode(metadata(path, value), "metadata")
                    publisher.send(datagram)
                    if recorded is not None:
                        expected.append((f"{stream_id}_meta", field, json.loads(datagram)["time"], recorded))
    return expected


def by_field(samples: list[Sample]) -> dict[tuple[str, str], list[tuple[float, Any]]]:
    """The samples of each feed and field, in the order of their times."""
    fields: dict[tuple[str, str], list[tuple[float, Any]]] = {}
    for feed, field, when, value in sorted(samples, key=lambda sample: sample[2]):
        fields.setdefault((feed, field), []).append((when, value))
    return fields


def assert_same(samples: list[Sample], expected: list[Sample]) -> None:
    """What was recorded is what was to be, with its times to the microsecond."""
    read, wanted = by_field(samples), by_field(expected)
    assert sorted(read) == sorted(wanted)
    for name, values in wanted.items():
        assert [value for _, value in read[name]] == [value for _, value in values], name
        assert [when for when, _ in read[name]] == pytest.approx([when for when, _ in values], rel=0, abs=2e-6), name


def send_mix(monitor: Agent) -> list[Sample]:
    """What both readers are given: all odd registers, and another stream that has them in other types."""
    other = [
        Register("AMCc.SOStream.open_g3stream", "AMCcSOStreamopen_g3stream", same(1, 0)),
        Register("AMCc.other", "AMCcother", same("text")),
    ]
    for no_name in ("", "a.b", "a b", "a,b=c", "#", "é"):
        send(monitor, no_name, other)
    return [
        *send(monitor, "ufm_mv5", ODD),
        *send(monitor, "crate1slot2-x", other),
        *send(monitor, "last", [Register("AMCc.last", "AMCclast", same(1))]),
    ]


def streams(reader: Reader) -> set[str]:
    """The streams of which the aggregator has got something."""
    providers = reader.client.record.status().session["data"].get("providers", {})
    return {address.rpartition(".feeds.")[2].removesuffix("_meta") for address in providers}


def test_the_aggregator_records_what_is_of_use_to_files_that_read_back(agent: StartAgent, tmp_path: Path) -> None:
    monitor = agent()
    monitor.client()
    with aggregator(tmp_path, monitor) as reader:
        expected = send_mix(monitor)
        reader.wait_for(lambda: {"ufm_mv5", "crate1slot2-x", "last"} <= streams(reader), 10, "has got all")
        assert reader.client.record.stop().status == ocs.OK
        assert reader.client.record.wait(timeout=10).session["success"] is True
        samples = read_g3(tmp_path)

    assert {block == field for _, block, field, _, _ in samples} == {True}
    prefix = f"observatory.{monitor.INSTANCE}.feeds."
    assert_same([(address.removeprefix(prefix), *rest) for address, _, *rest in samples], expected)
    kinds = {field: type(value) for _, field, _, value in expected}
    assert all(type(value) is kinds[field] for _, _, field, _, value in samples)
    assert "invalid" not in reader.log
    assert "Error" not in reader.log
    assert "Traceback" not in reader.log


def test_the_publisher_writes_what_is_of_use_to_influxdb(agent: StartAgent, tmp_path: Path) -> None:
    monitor = agent()
    monitor.client()
    with InfluxDB(tmp_path) as database, database.publisher(tmp_path, monitor) as reader:
        expected = send_mix(monitor)
        database.wait_for(lambda: "AMCclast" in database.types(monitor), 10, "has got the last sample")
        samples, types = database.samples(monitor), database.types(monitor)
        assert "Error" not in reader.log, reader.log[reader.log.index("Error") :][:1000]
        assert reader.client.record.status().session["degraded"] is False

    assert_same([(feed, field, when / 1e9, value) for feed, field, when, value in samples], expected)
    names = {str: "string", int: "integer", float: "float", bool: "boolean"}
    assert types == {field: names[type(value)] for _, field, _, value in expected}
    assert "Error" not in reader.log


@pytest.mark.parametrize(("first", "second"), [(1, 0.5), ("text", 1), (True, 1)], ids=repr)
def test_streams_that_have_one_register_in_two_types_do_not_cost_each_other_samples(
    agent: StartAgent, router: Router, tmp_path: Path, first: Any, second: Any
) -> None:
    monitor = agent()
    monitor.client()
    with (
        InfluxDB(tmp_path) as database,
        database.publisher(tmp_path, monitor) as reader,
        Subscriber(tmp_path, router) as subscriber,
    ):
        send(monitor, "s0", [Register("AMCc.z", "", same(1))])
        wait_until(lambda: subscriber.metadata("s0"), 10, "the buffers were published: they hold the next second")
        for stream_id, value in (("s1", first), ("s2", second)):
            send(monitor, stream_id, [Register("AMCc.x", "", same(value)), Register("AMCc.y", "", same(1))])
        wait_until(lambda: [v for _, f, _, v in database.samples(monitor) if f == "AMCcy"] == [1, 1], 10, "both have y")
        assert "Error" not in reader.log
        assert reader.client.record.status().session["degraded"] is False


def test_of_a_register_that_widens_influxdb_keeps_the_type_and_the_other_samples(
    agent: StartAgent, tmp_path: Path
) -> None:
    monitor = agent()
    monitor.client()

    def y(database: InfluxDB) -> list[Any]:
        return [value for _, field, _, value in database.samples(monitor) if field == "AMCcy"]

    with InfluxDB(tmp_path) as database, database.publisher(tmp_path, monitor) as reader:
        send(monitor, "s1", [Register("AMCc.x", "", same(1)), Register("AMCc.y", "", same(1))])
        wait_until(lambda: y(database) == [1], 10, "the integers are stored")
        send(monitor, "s1", [Register("AMCc.x", "", same(0.5)), Register("AMCc.y", "", same(2))])
        wait_until(lambda: y(database) == [1, 2], 10, "the other register's next value is stored")

        assert database.types(monitor)["AMCcx"] == "integer"
        assert [value for _, field, _, value in database.samples(monitor) if field == "AMCcx"] == [1]
        assert "already exists as type integer" in reader.log
