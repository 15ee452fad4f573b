"""The documentation matches the code: every condition, event, field, option and quoted message, and no others."""

from __future__ import annotations

import argparse
import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from socs_monitor.cli.health import State
from socs_monitor.feeds.statistics import FIELDS
from socs_monitor.health.events import EVENTS
from socs_monitor.settings import make_parser

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "socs_monitor"
DOCS = ROOT / "docs"

WRONG_USAGE = 2  # argparse's own
INTERRUPTED = 130

# Quoted messages of the kernel and of Twisted, and what the command line adds to a reason.
FOREIGN = {"No such file or directory", "Permission denied", "Couldn't listen on"}
ADDED = re.compile(r"^refused: (path )?| 1 h$")

UNITS = {"MiB": 1 << 20, "GiB": 1 << 30}


def section(page: str, title: str) -> str:
    """Return a section of a page with its subsections."""
    _, _, rest = (DOCS / page).read_text().partition(f"\n{title}\n{'-' * len(title)}\n")
    assert rest, f"{page} has no section {title}"
    return re.split(r"\n[^\n]+\n-{4,}\n", rest, maxsplit=1)[0]


_BEGIN_CONDITION = ("set_condition", "set_condition_for", "evaluate_condition")


def conditions_of_code() -> Iterator[str]:
    """Yield the first argument of every call of ``set_condition`` or ``set_condition_for``."""
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and getattr(node.func, "attr", "") in _BEGIN_CONDITION:
                condition = node.args[0]
                assert isinstance(condition, ast.Constant), f"{path.name}:{node.lineno}: use a literal condition name"
                yield str(condition.value)


def test_each_condition_is_documented() -> None:
    documented = re.findall(r"^``([^`\n]+)``\n~+$", section("operations/problems.rst", "Conditions"), re.M)
    assert sorted(documented) == sorted(set(conditions_of_code()))


def test_each_condition_has_its_meaning_and_its_remedy() -> None:
    entries = re.split(r"^``[^`\n]+``\n~+$", section("operations/problems.rst", "Conditions"), flags=re.M)[1:]
    assert all("*What it means.*" in entry and "*What to do.*" in entry for entry in entries)


def test_each_message_quoted_in_troubleshooting_exists() -> None:
    trees = [ast.parse(path.read_text()) for path in PACKAGE.rglob("*.py")]
    constants = {node.value for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Constant)}
    texts = "\n".join(text for text in constants if isinstance(text, str))
    terms = re.findall(r'^"(.+)"$', (DOCS / "operations/problems.rst").read_text(), re.M)
    parts = [
        part for term in terms for quoted in term.split('", "') for part in re.split(r", (?=given)|\.\.\.", quoted)
    ]
    stripped = {ADDED.sub("", part.strip()).strip() for part in parts}
    assert [part for part in sorted(stripped - FOREIGN) if part not in texts] == []


def test_each_event_of_the_log_is_documented() -> None:
    documented = re.findall(r"^``([a-z_]+)``$", section("operations/log.rst", "Events"), re.M)
    assert sorted(documented) == sorted(EVENTS)


def test_each_field_of_the_statistics_is_documented() -> None:
    table = section("operations/monitoring.rst", "The feed ``monitor_stats``").split("\n=")[2]
    documented = re.findall(r"``([a-z_]+)``(?=,|  )", table)
    assert sorted(documented) == sorted(FIELDS)


def test_each_alert_is_documented() -> None:
    rules = yaml.safe_load((ROOT / "docker/grafana/provisioning/alerting/rules.yaml").read_text())
    documented = re.findall(
        r"^PysmurfMonitor.*?(?=  )", section("operations/monitoring.rst", "Dashboard and alerts"), re.M
    )
    assert sorted(documented) == sorted(rule["title"] for group in rules["groups"] for rule in group["rules"])


def test_each_exit_code_is_documented() -> None:
    documented = re.findall(r"^``(\d+)``", section("operations/commands.rst", "Exit codes"), re.M)
    assert sorted(map(int, documented)) == sorted({*(state.value for state in State), WRONG_USAGE, INTERRUPTED})


def test_each_module_is_in_the_api() -> None:
    documented = re.findall(r"^\.\. automodule:: socs_monitor\.([\w.]+)$", (DOCS / "api.rst").read_text(), re.M)
    named = {".".join(path.relative_to(PACKAGE).with_suffix("").parts) for path in PACKAGE.rglob("*.py")}
    modules = {name.removesuffix(".__init__") for name in named} - {"__init__", "plugin"}
    modules -= {name for name in modules if name.startswith("cli.")} - set(documented)
    assert sorted(documented) == sorted(modules)


def test_the_readme_lists_each_option_with_its_default() -> None:
    table = dict(re.findall(r"^\| `(--[a-z-]+)[^`]*` \|([^|]*)\|", (ROOT / "README.md").read_text(), re.M))
    of_ocs = {"--crossbar-timeout"}
    of_agent = {action.option_strings[-1]: action for action in make_parser()._actions[1:]}
    assert table.keys() - of_ocs == of_agent.keys()
    for option, action in of_agent.items():
        assert is_default(table[option].strip(" `"), action), option


def is_default(documented: str, action: argparse.Action) -> bool:
    """Return whether `documented` is an option's default. An empty default may be described in words."""
    if not action.default:
        return not documented[:1].isdigit()
    number, _, unit = documented.partition(" ")
    value = str(int(number) * UNITS[unit]) if unit else documented
    return value == f"{action.default:g}" if isinstance(action.default, float) else value == str(action.default)


@pytest.mark.parametrize("page", ["README.md", "tests/README.md"])
def test_relative_links_exist(page: str) -> None:
    links = re.findall(r"\]\((?!https?:)([^)#]+)", (ROOT / page).read_text())
    assert all((ROOT / page).parent.joinpath(link).exists() for link in links), links
