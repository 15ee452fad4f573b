"""``socs-monitor completion``: print the shell completion script."""

from __future__ import annotations

import argparse
from typing import Any

import shtab

_FILES: dict[str, Any] = {"FILE": shtab.FILE, "ROOT": shtab.DIRECTORY}  # by metavar


def define(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.description = (
        "Print the shell completion script. For bash: socs-monitor completion bash >"
        " ~/.local/share/bash-completion/completions/socs-monitor. For zsh: socs-monitor completion zsh >"
        " _socs-monitor, in a folder of $fpath."
    )
    parser.add_argument("shell", choices=("bash", "zsh"))
    parser.set_defaults(run=_completion)


def _completion(args: argparse.Namespace) -> None:
    parser = args.make_parser()
    _complete_files(parser)
    print(shtab.complete(parser, args.shell))


def _complete_files(parser: argparse.ArgumentParser) -> None:
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                _complete_files(command)
        elif action.metavar in _FILES:
            action.complete = _FILES[action.metavar]  # type: ignore[attr-defined]
