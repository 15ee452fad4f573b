"""The running agent, as the ``socs-monitor`` command reaches it: its options and its operations."""

from __future__ import annotations

import argparse
import os
from typing import Any

from ocs.ocs_client import OCSClient

from socs_monitor import options
from socs_monitor.siteconfig import parse_args


class ClientError(Exception):
    """The agent's configuration or the agent cannot be reached; the text says what to do."""


def configuration(args: argparse.Namespace) -> argparse.Namespace:
    """Return the agent's own options, out of the site config where there is one, else their defaults.

    Raises:
        ClientError: If there is a site config, but it has no such agent.
    """
    site = _site_arguments(args)
    if args.site_file is None and "OCS_CONFIG_DIR" not in os.environ:
        found = options.make_parser().parse_args([])
        found.instance_id = args.instance_id
    else:
        try:
            found = parse_args([*site, "--instance-id", args.instance_id])
        except (KeyError, RuntimeError, OSError, AssertionError) as error:
            raise ClientError(
                f"the site config does not tell of {args.instance_id} on this host: {error}. Name it with --site-file"
                " and --site-host, or set OCS_CONFIG_DIR"
            ) from error
    for name in ("db_path", "spool_path"):
        if getattr(args, name, None) is not None:
            setattr(found, name, getattr(args, name))
    return found


def connect(args: argparse.Namespace) -> Any:
    """Return an OCSClient of the agent.

    Raises:
        ClientError: If router or agent do not answer.
    """
    try:
        return OCSClient(args.instance_id, privs=_privileges(), args=_site_arguments(args))
    except (RuntimeError, OSError, AssertionError) as error:
        raise ClientError(
            f"the agent {args.instance_id} does not answer over the router: {error}. Is the router up, and does the"
            " site config name it (--site-file, or OCS_CONFIG_DIR)?"
        ) from error


def _site_arguments(args: argparse.Namespace) -> list[str]:
    given = [("--site-file", args.site_file), ("--site-host", args.site_host)]
    return [part for option, value in given if value is not None for part in (option, value)]


def _privileges() -> int:
    """The level to ask for: OCS reads a password from this user's file, and fails where there is none."""
    passwords = os.environ.get("OCS_PASSWORDS_FILE") or os.path.expanduser("~/.ocs-passwords.yaml")
    return 3 if os.path.exists(passwords) else 1
