"""How the ``socs-monitor`` command finds the agent's settings, and calls the agent via the router.

The container's health check runs twice a minute. `run_session` therefore does without pydantic, SQLAlchemy, Twisted
and OCS's own client: `status --brief` takes 0.10 s of CPU time instead of 0.26 s. All else imports them when needed.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import io
import json
import os
import urllib.error
import urllib.request
from typing import TYPE_CHECKING, Any

import yaml
from ocs import ERROR, site_config

from socs_monitor.cli.shared import CommandError

if TYPE_CHECKING:
    from socs_monitor.settings import Settings

# Timeouts for a reply of the agent and of the router itself, in seconds. OCS's client has none.
_AGENT_S = 6.0
_ROUTER_S = 3.0

# What OCS raises if there is no site config, or if it cannot interpret it.
_SITE_CONFIG_ERRORS = (AssertionError, AttributeError, KeyError, OSError, RuntimeError, TypeError, yaml.YAMLError)


class RouterAwayError(CommandError):
    """The router does not answer, so the agent's state is unknown. The agent registers files without a router."""


def settings_of(args: argparse.Namespace) -> Settings:
    """Return the agent's settings: from the site config if one is given, otherwise the defaults.

    Raises:
        CommandError: If the site config cannot be used, or has no such agent, or one with invalid options.
    """
    from socs_monitor.settings import Settings, make_parser, parse_args

    agent = args.instance_id
    if not has_site_config(args):
        found = make_parser().parse_args([])
        found.instance_id = agent
    else:
        stderr = io.StringIO()
        try:
            with contextlib.redirect_stderr(stderr):
                found = parse_args([*_site_arguments(args), "--instance-id", agent])
        except SystemExit as error:
            reason = stderr.getvalue().strip().rpartition("error: ")[2]
            raise CommandError(f"The site config has an invalid option for agent '{agent}': {reason}") from error
        except _SITE_CONFIG_ERRORS as error:
            raise CommandError(
                f"The site config has no usable entry for agent '{agent}' on this host ({error}). Check --instance-id,"
                " --site-file (or OCS_CONFIG_DIR) and --site-host."
            ) from error
    for name in ("db_path", "spool_path"):
        if getattr(args, name, None) is not None:
            setattr(found, name, getattr(args, name))
    return Settings.from_args(found)


def has_site_config(args: argparse.Namespace) -> bool:
    """Whether a site config is given; it may still be unreadable."""
    return args.site_file is not None or "OCS_CONFIG_DIR" in os.environ


def run_session(args: argparse.Namespace) -> dict[str, Any]:
    """Return OCS's session of the agent's operation `run`; empty if the operation was never started.

    Raises:
        RouterAwayError: If the router does not answer in time.
        CommandError: If the agent does not.
    """
    if not has_site_config(args):
        raise CommandError("No site config given. Use --site-file, or set OCS_CONFIG_DIR.")
    agent = args.instance_id
    try:
        parsed = site_config.parse_args(agent_class="*control*", args=_site_arguments(args))
        hub = site_config.get_config(parsed, "*control*").site.hub.data
        url, procedure = hub["wamp_http"], f"{hub['address_root']}.{agent}.ops"
    except _SITE_CONFIG_ERRORS as error:
        raise CommandError(
            f"The site config cannot be used ({error}). Check --site-file (or OCS_CONFIG_DIR)."
        ) from error
    body = json.dumps({"procedure": procedure, "args": ["status", "run"]}).encode()
    request = urllib.request.Request(url, body, {"Content-Type": "application/json"})  # noqa: S310 (the site's own)
    away = f"The router at {url} does not answer. Files are registered without it. Check that it is running."
    try:
        with urllib.request.urlopen(request, timeout=_AGENT_S) as response:  # noqa: S310
            reply = json.load(response)
    except (urllib.error.HTTPError, ValueError) as error:
        raise CommandError(f"{url} is not an OCS router ({error}). Check wamp_http in the site config.") from error
    except TimeoutError as error:
        if not _answers(url):
            raise RouterAwayError(away) from error
        raise CommandError(
            f"The router is up, but agent '{agent}' did not reply within {_AGENT_S:.0f} s. Check its log, then restart"
            " it."
        ) from error
    except (OSError, http.client.HTTPException) as error:
        raise RouterAwayError(away) from error
    if reply.get("error") == "wamp.error.no_such_procedure":
        raise CommandError(f"The router is up, but no agent '{agent}' is connected. Start it, or check --instance-id.")
    if "error" in reply:
        raise CommandError(f"The router rejected the call ({reply['error']}). Check hub in the site config.")
    code, _, session = reply["args"][0]
    if code == ERROR:
        raise CommandError(f"Agent '{agent}' is not a PysmurfMonitor: it has no operation run. Check --instance-id.")
    return session or {}


def connect(args: argparse.Namespace) -> Any:
    """Return an OCSClient of the agent.

    Raises:
        CommandError: If router or agent do not answer.
    """
    run_session(args)  # OCSClient would wait forever, or raise an error that needs an explanation
    from ocs.ocs_client import OCSClient

    try:
        return OCSClient(args.instance_id, privs=_privileges(), args=_site_arguments(args))
    except RuntimeError as error:
        raise CommandError(f"Agent '{args.instance_id}' rejected the connection: {error}") from error


def done(reply: Any) -> Any:
    """Return the reply of an operation that succeeded.

    Raises:
        CommandError: If it failed, with its last message.
    """
    if not (reply.session and reply.session.get("success")):
        raise CommandError(message(reply))
    return reply


def message(reply: Any) -> str:
    """Return the last message of an operation."""
    messages = [text for _, text in (reply.session or {}).get("messages", ()) if not text.startswith("Status is now")]
    return str(messages[-1] if messages else reply.msg)


def _answers(url: str) -> bool:
    """Whether an HTTP server answers there, with whatever status."""
    try:
        urllib.request.urlopen(url, timeout=_ROUTER_S).close()  # noqa: S310
    except urllib.error.HTTPError:
        return True
    except OSError:
        return False
    return True


def _site_arguments(args: argparse.Namespace) -> list[str]:
    given = {
        "--site-file": args.site_file,
        "--site-host": args.site_host or os.environ.get("SITE_HOST"),
        "--site-hub": os.environ.get("SITE_HUB"),
        "--site-http": os.environ.get("SITE_HTTP"),
    }
    return [part for option, value in given.items() if value for part in (option, value)]


def _privileges() -> int:
    """The OCS access level to request. OCS fails if there is no password file to look it up in."""
    passwords = os.environ.get("OCS_PASSWORDS_FILE") or os.path.expanduser("~/.ocs-passwords.yaml")
    return 3 if os.path.exists(passwords) else 1
