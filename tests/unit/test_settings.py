"""The options as OCS hands them to the agent: of command line and site config, none is lost."""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from socs_monitor import INSTANCE
from socs_monitor.registration.lookup import Policy
from socs_monitor.settings import Settings, parse_args
from tests.testbed.processes import SITE_CONFIG

A, B, C = "/a", "/b", "/c"


def parse(folder: Path, in_site: Sequence[Any], command_line: Sequence[str] = ()) -> Any:
    """The agent's options, where the site config of the example has these arguments."""
    config = yaml.safe_load(SITE_CONFIG.read_text())
    config["hosts"]["localhost"]["agent-instances"][0]["arguments"] = list(in_site)
    path = folder / "site.yaml"
    path.write_text(yaml.safe_dump(config))
    return parse_args(["--site-file", str(path), "--site-host", "localhost", *command_line])


@pytest.mark.parametrize(
    ("in_site", "expected"),
    [
        ([], []),
        ([["--data-root", A]], [A]),
        ([["--data-root", A], ["--data-root", B]], [A, B]),
        ([["--data-root", A, B]], [A, B]),
        ([["--data-root", A, B], ["--udp-port", 1], ["--data-root", C]], [A, B, C]),
        (["--data-root", A, "--data-root", B], [A, B]),
        ([["--data-root", [A, B]]], [A, B]),
        ([[["--data-root", A], ["--data-root", B]]], [A, B]),
        (["--data-root=/a", "--data-root=/b"], [A, B]),
        ([["--data-root=/a"], ["--data-root", B]], [A, B]),
        ([["--data-r", A]], [A]),
    ],
    ids=str,
)
def test_every_data_root_of_the_site_config_counts(tmp_path: Path, in_site: Sequence[Any], expected: list[str]) -> None:
    assert parse(tmp_path, in_site).data_root == expected


@pytest.mark.parametrize(
    ("command_line", "expected"),
    [
        (["--data-root", A], [A]),
        (["--data-root", A, B], [A, B]),
        (["--data-root", A, "--data-root", B], [A, B]),
        (["--data-root=/a", "--data-root=/b"], [A, B]),
        (["--data-root=/a", "--udp-port", "1", "--data-root", B, C], [A, B, C]),
        (["--data-r", A], [A]),
    ],
    ids=" ".join,
)
@pytest.mark.parametrize("in_site", [[], [["--data-root", "/of/the/site"]]], ids=["alone", "before the site config"])
def test_every_data_root_of_the_command_line_counts(
    tmp_path: Path, in_site: Sequence[Any], command_line: list[str], expected: list[str]
) -> None:
    assert parse(tmp_path, in_site, command_line).data_root == expected


def test_all_allowed_senders_count(tmp_path: Path) -> None:
    in_site = [["--allow-sender", "10.0.0.0/24"], ["--allow-sender", "10.1.0.5", "fd00::/8"]]

    expected = [ipaddress.ip_network(text) for text in ("10.0.0.0/24", "10.1.0.5/32", "fd00::/8")]
    assert parse(tmp_path, in_site).allow_sender == expected
    assert parse(tmp_path, []).allow_sender == []
    assert parse(tmp_path, in_site, ["--allow-sender=127.0.0.1"]).allow_sender == [ipaddress.ip_network("127.0.0.1/32")]


@pytest.mark.parametrize("text", ["10.0.0.5/24", "host", "10.0.0.0/33", "::1/129"])
def test_an_invalid_network_is_refused(tmp_path: Path, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        parse(tmp_path, [], ["--allow-sender", text])
    assert stop.value.code == 2
    assert "write e.g. 10.0.0.0/24" in capsys.readouterr().err


def test_options_that_are_given_once_are_as_ocs_has_them(tmp_path: Path) -> None:
    in_site = [["--udp-port", 8300], ["--create-table", False], ["--spool-size", 5000], ["--give-up-after", 2.5]]
    args = parse(tmp_path, in_site, ["--udp-port", "8400"])

    assert (args.udp_port, args.create_table, args.spool_size, args.give_up_after) == (8400, False, 5000, 2.5)
    assert args.instance_id == INSTANCE


@pytest.mark.parametrize(("given", "expected"), [([], 0), (["--crossbar-timeout", "7"], 7)], ids=str)
def test_the_agent_waits_for_the_router_forever_by_default(tmp_path: Path, given: list[str], expected: int) -> None:
    assert parse(tmp_path, [], given).crossbar_timeout == expected


def test_data_roots_are_absolute_and_no_disk_is_touched_for_them(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    args = parse(tmp_path, [["--data-root", f"{tmp_path}/link", f"{tmp_path}/real/../other/"]])

    assert Settings.from_args(args).policy.data_roots == (f"{tmp_path}/link", f"{tmp_path}/other")


def test_without_the_options_files_are_treated_as_by_default(tmp_path: Path) -> None:
    policy = Settings.from_args(parse(tmp_path, [])).policy
    assert policy == Policy(own=policy.own)
