"""The agent's options, as OCS puts them together from the command line and the site config."""

from __future__ import annotations

import argparse
import sys

from ocs import site_config

from socs_monitor import options

AGENT_CLASS = "PysmurfMonitor"

_WAIT_FOR_EVER = 0
_NOT_GIVEN = -1


def parse_args(args: list[str] | None) -> argparse.Namespace:
    """Parse the command line together with the site config, as OCS does, but with this agent's defaults."""
    parser = options.make_parser()
    parser.set_defaults(crossbar_timeout=_NOT_GIVEN)
    parsed: argparse.Namespace = site_config.parse_args(agent_class=AGENT_CLASS, parser=parser, args=args)
    _, host, instance = site_config.get_config(parsed, AGENT_CLASS)
    given = sys.argv[1:] if args is None else args
    of_site = [str(word) for word in _words(instance.arguments)]

    def repeated(option: str) -> list[str]:
        return options.repeated(given, option) or options.repeated(of_site, option)

    parsed.data_root = repeated("--data-root")
    parsed.allow_sender = [options.network(value) for value in repeated("--allow-sender")]
    if parsed.crossbar_timeout == _NOT_GIVEN:
        # OCS's default lets the agent exit 10 s after losing the router; files do not need one
        parsed.crossbar_timeout = host.data.get("crossbar_timeout", _WAIT_FOR_EVER)
    return parsed


def _words(argument: object) -> list[object]:
    return [word for part in argument for word in _words(part)] if isinstance(argument, list) else [argument]
