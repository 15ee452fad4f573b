"""`socs-monitor completion` in real shells."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from socs_monitor.cli import main as cli
from tests.integration.test_cli import command, run
from tests.testbed.processes import OWN_BIN, require

# What bash does when Tab is pressed at the end of the words.
_TAB = """
source "$1"; shift
COMP_WORDS=("$@"); COMP_CWORD=$(( $# - 1 )); COMP_LINE="$*"; COMP_POINT=${#COMP_LINE}
function_=$(complete -p socs-monitor | sed 's/.*-F \\([^ ]*\\) .*/\\1/')
"$function_" socs-monitor "${COMP_WORDS[COMP_CWORD]}" "${COMP_WORDS[COMP_CWORD - 1]}"
printf '%s\\n' "${COMPREPLY[@]}"
"""


@pytest.fixture
def script(tmp_path: Path) -> Path:
    path = tmp_path / "completion.bash"
    path.write_text(command("completion", "bash"))
    return path


def offered(script: Path, *words: str) -> list[str]:
    done = run(require("bash"), "--norc", "-c", _TAB, "bash", script, "socs-monitor", *words)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout.split()


def test_bash_completes_commands(script: Path) -> None:
    assert sorted(offered(script, "")) == sorted(cli.COMMANDS)
    assert offered(script, "st") == ["status"]


def test_bash_completes_options_and_actions(script: Path) -> None:
    assert offered(script, "status", "--w") == ["--watch"]
    assert set(offered(script, "files", "--")) >= {"--archive", "--since", "--uncopied", "--json", "--limit"}
    assert sorted(offered(script, "failed", "")) == ["discard", "list", "retry"]
    assert offered(script, "completion", "z") == ["zsh"]


def test_bash_completes_files(script: Path, tmp_path: Path) -> None:
    (tmp_path / "some.npy").touch()
    (tmp_path / "folder").mkdir()
    start = f"{tmp_path}{os.sep}"
    assert f"{start}some.npy" in offered(script, "send", start)
    assert [path.rstrip("/") for path in offered(script, "backfill", start)] == [f"{start}folder"]


def test_the_zsh_script_is_generated(tmp_path: Path) -> None:
    script = tmp_path / "_socs-monitor"
    script.write_text(command("completion", "zsh"))
    assert script.read_text().startswith("#compdef socs-monitor")
    assert "--watch" in script.read_text()


def test_the_script_does_not_start_python() -> None:
    assert str(OWN_BIN) not in command("completion", "bash")
    assert "python" not in command("completion", "bash").lower()
