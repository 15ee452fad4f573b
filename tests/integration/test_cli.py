"""The command `socs-monitor` with a running agent, and with the spool of a stopped one."""

from __future__ import annotations

import contextlib
import io
import os
import re
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from socs_monitor import INSTANCE
from socs_monitor.cli import main as cli
from socs_monitor.wire.publisher import Publisher
from tests.chain import write_file
from tests.evidence import acknowledged
from tests.integration.test_end_to_end import announce, data, files, wait_registered
from tests.testbed.processes import OWN_BIN, Agent, wait_until

StartAgent = Callable[..., Agent]

MISSING = "No such file or directory"

COLUMNS = "400"  # wide enough that no line is wrapped
SITE_VARIABLES = ("INSTANCE_ID", "OCS_CONFIG_DIR", "SITE_HOST", "SITE_HTTP", "SITE_HUB")


def command(*words: object, code: int = 0) -> str:
    """Run the command in this process, check its exit code, and return its output, or its errors if it failed."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), pytest.MonkeyPatch.context() as patch:
        for name in SITE_VARIABLES:
            patch.delenv(name, raising=False)
        patch.setenv("COLUMNS", COLUMNS)
        try:
            ended = cli.main([*map(str, words)])
        except SystemExit as stop:
            ended = stop.code
    assert ended == code, f"{out.getvalue()}\n{err.getvalue()}"
    return err.getvalue() if code and err.getvalue() else out.getvalue()


def run(*words: object, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """Run a program to its end, whatever terminal and site the tests themselves have."""
    own = {name: value for name, value in os.environ.items() if name not in SITE_VARIABLES}
    own |= {"COLUMNS": COLUMNS, **(env or {})}
    return subprocess.run([*map(str, words)], env=own, capture_output=True, text=True, timeout=60, check=False)


def site(monitor: Agent) -> list[str]:
    """The options that select an agent."""
    return ["--site-file", str(monitor.site_config), "--site-host", "localhost"]


def send_missing(monitor: Agent, paths: Sequence[Path]) -> None:
    with contextlib.closing(Publisher("crate1slot2", monitor.address)) as publisher:
        for path in paths:
            publisher.data_file(str(path), action="act", action_ts="1700000000")


def with_dead_letters(agent: StartAgent, paths: Sequence[Path], options: Sequence[Sequence[object]] = ()) -> Agent:
    """An agent with dead letters."""
    monitor = agent(options=[["--give-up-after", 0.2], *options])
    send_missing(monitor, paths)
    client = monitor.client()
    monitor.wait_for(lambda: files(client).get("dead") == len(paths), 10, f"gave up {len(paths)} files")
    return monitor


def timestreams(root: Path, count: int, age_s: float = 1000) -> list[str]:
    """Write timestream files whose last change is `age_s` seconds ago."""
    paths = [root / "17000" / f"ufm_{number % 2}" / f"1700000000_{number:03}.g3" for number in range(count)]
    for path in paths:
        write_file(path, path.name.encode())
        os.utime(path, (time.time() - age_s,) * 2)
    return sorted(map(str, paths))


def test_send_announces_files_as_pysmurf_does(agent: StartAgent, tmp_path: Path) -> None:
    monitor = agent()
    folder = tmp_path / "17000" / "ufm_1"
    sent = [folder / name for name in ("1700000000_001.g3", "x.npy", "notes.txt")]
    for path in sent:
        write_file(path, path.name.encode())
    relative = os.path.relpath(sent[2])
    to = ["--to", f"127.0.0.1:{monitor.udp_port}"]
    done = run(OWN_BIN / "socs-monitor", "send", *to, "--id", "me", "--action", "by_hand", *sent[:2], relative)
    wait_registered(monitor, [str(path) for path in sent])

    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines() == [f"sent to 127.0.0.1:{monitor.udp_port}: {path}" for path in sent]
    g3, *others = monitor.rows()
    assert (g3["archive_name"], g3["remote_path"]) == ("timestreams", "17000/ufm_1/1700000000_001.g3")
    for row in others:
        name = os.path.basename(row["local_path"])
        assert row["archive_name"] == "smurf"
        assert re.fullmatch(rf"\d{{5}}/me/\d+_by_hand/outputs/{re.escape(name)}", row["remote_path"])


def test_send_refuses_paths_that_are_not_files(tmp_path: Path) -> None:
    assert f"{tmp_path} is not a file" in command("send", tmp_path, code=1)
    assert f"{tmp_path}/none is not a file" in command("send", tmp_path / "none", code=1)


@pytest.mark.parametrize(
    "words",
    [
        *((), ("send",), ("failed",), ("failed", "lose"), ("failed", "retry", "one"), ("backfill",), ("sned", "x")),
        *(("send", "--to", address, "x") for address in ("host", ":1", "host:", "host:http")),
    ],
    ids=" ".join,
)
def test_wrong_usage_has_exit_code_2(words: Sequence[str]) -> None:
    assert "usage: socs-monitor" in command(*words, code=2)


@pytest.mark.parametrize("running", [True, False], ids=["running", "stopped"])
def test_dead_letters_are_listed_retried_and_discarded(agent: StartAgent, tmp_path: Path, running: bool) -> None:
    paths = [tmp_path / name for name in ("one.txt", "two.txt", "three.txt")]
    monitor = with_dead_letters(agent, paths)
    if not running:
        assert monitor.stop() == 0
    listed = command("failed", "list", *site(monitor))
    assert "3 of 3 dead letters" in listed
    ids = []
    for path in paths:
        (line,) = [line for line in listed.splitlines() if f" {path} " in line]
        assert MISSING in line
        assert "127.0.0.1:" in line
        ids.append(re.findall(r"\d+", line)[0])

    write_file(paths[0], b"one")
    retried = "tried again" if running else "will be retried when the agent starts"
    assert command("failed", "retry", *site(monitor), ids[0]) == f"1 dead letter {retried}.\n"
    assert command("failed", "discard", *site(monitor), ids[1]) == "1 dead letter discarded.\n"
    listed = command("failed", "list", *site(monitor))
    assert str(paths[2]) in listed
    assert str(paths[1]) not in listed
    if not running:
        monitor.start()
    wait_registered(monitor, [str(paths[0])])
    write_file(paths[2], b"three")
    command("failed", "retry", *site(monitor))
    wait_registered(monitor, [str(paths[0]), str(paths[2])])
    assert "No dead letters." in command("failed", "list", *site(monitor))


def test_an_unknown_dead_letter_is_an_error(agent: StartAgent, tmp_path: Path) -> None:
    monitor = with_dead_letters(agent, [tmp_path / "one.txt"])

    for action in ("retry", "discard"):
        assert "0 dead letters" in command("failed", action, *site(monitor), 4711, code=1)
    monitor.stop()
    for action in ("retry", "discard"):
        assert "0 dead letters" in command("failed", action, *site(monitor), 4711, code=1)
    assert "1 of 1" in command("failed", "list", *site(monitor))


def test_text_from_senders_is_displayed_literally(agent: StartAgent, tmp_path: Path) -> None:
    odd = ["/a/[/bold]x", "/a/[red]x[/red]", "/a/\x1b[31mred", "/a/\x1b]0;title\x07", "/a/\u202egpj.exe", "/a/x\ny"]
    monitor = agent()
    with contextlib.closing(Publisher("[/]\x1b[2J", monitor.address)) as publisher:
        for path in odd:
            publisher.data_file(path)
    client = monitor.client()
    monitor.wait_for(lambda: files(client).get("dead") == len(odd), 10, "refused them")
    listings = [command("failed", "list", *site(monitor))]
    monitor.stop()
    listings.append(command("failed", "list", *site(monitor)))

    for listing in listings:
        assert "/a/[/bold]x" in listing
        assert "/a/[red]x[/red]" in listing
        assert all(character.isprintable() or character == "\n" for character in listing), repr(listing)


@pytest.mark.parametrize("running", [True, False], ids=["running", "stopped"])
def test_backfill_registers_timestreams_without_a_row(agent: StartAgent, tmp_path: Path, running: bool) -> None:
    root = tmp_path / "timestreams"
    old = timestreams(root, 30)
    (root / "17000" / "ufm_0" / "still_written.g3").touch()
    monitor = agent()
    command("send", "--to", f"127.0.0.1:{monitor.udp_port}", *old[:7])
    wait_registered(monitor, old[:7])
    if not running:
        assert monitor.stop() == 0

    said = command("backfill", *site(monitor), "--dry-run", root)
    assert "Checked 30 timestream files: 23 without a row. Dry run: nothing was registered." in said
    assert [line.removeprefix("no row: ") for line in said.splitlines() if line.startswith("no row: ")] == old[7:27]
    assert "... and 3 more" in said
    assert acknowledged(monitor) == set(old[:7])

    said = command("backfill", *site(monitor), root)
    assert ("The agent is registering them." if running else "registered when the agent starts.") in said
    if not running:
        assert len(monitor.rows()) == 7
        monitor.start()
    wait_registered(monitor, old)
    assert "Checked 30 timestream files: none without a row." in command("backfill", *site(monitor), root)
    assert {row["archive_name"] for row in monitor.rows()} == {"timestreams"}


@pytest.mark.parametrize("running", [True, False], ids=["running", "stopped"])
def test_backfill_of_a_missing_folder_fails(agent: StartAgent, tmp_path: Path, running: bool) -> None:
    monitor = agent()
    wait_registered(monitor, announce(monitor, tmp_path / "data", 1))
    if running:
        monitor.client()
    else:
        monitor.stop()

    assert MISSING in command("backfill", *site(monitor), tmp_path / "none", code=1)


def test_options_replace_a_site_config(agent: StartAgent, tmp_path: Path) -> None:
    paths = [tmp_path / "one.txt"]
    monitor = with_dead_letters(agent, paths)
    monitor.stop()

    for words in (["--db-path", monitor.db_path], ["--spool-path", f"{monitor.db_path}.{INSTANCE}.spool"]):
        assert str(paths[0]) in command("failed", "list", *words)


def test_the_site_config_is_found_in_ocs_config_dir(agent: StartAgent, tmp_path: Path) -> None:
    monitor = with_dead_letters(agent, [tmp_path / "one.txt"])
    (tmp_path / "default.yaml").write_text(monitor.site_config.read_text())

    words = ("failed", "list", "--site-host", "localhost")
    done = run(OWN_BIN / "socs-monitor", *words, env={"OCS_CONFIG_DIR": str(tmp_path)})
    assert (done.returncode, done.stderr) == (0, "")
    assert "1 of 1" in done.stdout


def test_a_missing_spool_site_config_or_agent_is_an_error(agent: StartAgent, tmp_path: Path) -> None:
    assert "There is no spool" in command("failed", "list", "--db-path", tmp_path / "none.db", code=1)
    assert "--site-file" in command("failed", "list", "--site-file", tmp_path / "none.yaml", code=1)
    for content in ("hub: [", "hub: 1", "[]"):
        (tmp_path / "broken.yaml").write_text(content)
        assert "--site-file" in command("failed", "list", "--site-file", tmp_path / "broken.yaml", code=1)
    monitor = agent()
    said = command("failed", "list", *site(monitor), "--instance-id", "another", code=1)
    assert "no usable entry for agent 'another'" in said


def test_a_missing_router_is_an_error(agent: StartAgent, tmp_path: Path) -> None:
    monitor = agent()
    elsewhere = tmp_path / "elsewhere.yaml"
    elsewhere.write_text(
        re.sub(r"(?m)^( *wamp_http): .*$", r"\1: http://127.0.0.1:1/call", monitor.site_config.read_text())
    )

    said = command("failed", "list", "--site-file", elsewhere, "--site-host", "localhost", code=1)
    assert "The router at http://127.0.0.1:1/call does not answer." in said


def test_another_user_is_refused_before_anything_is_touched(
    agent: StartAgent, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spool = tmp_path / "other" / "spool"
    with_dead_letters(agent, [tmp_path / "one.txt"], [["--spool-path", str(spool)]]).stop()
    owner = os.geteuid()
    before = {path.name: path.stat().st_mtime_ns for path in spool.parent.iterdir()}

    monkeypatch.setattr(os, "geteuid", lambda: 65_534)  # root could touch everything, so touching would be noticed
    for action in (["list"], ["retry"], ["discard", "--all"]):
        said = command("failed", *action, "--spool-path", spool, code=1)
        assert f"belongs to user {owner}. Run this as that user" in said
    assert {path.name: path.stat().st_mtime_ns for path in spool.parent.iterdir()} == before


def test_commands_leave_the_spool_unlocked(agent: StartAgent, tmp_path: Path) -> None:
    monitor = with_dead_letters(agent, [tmp_path / "one.txt"])
    monitor.stop()
    command("failed", "list", *site(monitor))
    monitor.start()
    client = monitor.client()

    wait_until(lambda: data(client).get("files", {}).get("dead") == 1, 10, "it has its spool again")
