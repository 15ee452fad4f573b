"""The agent, as the ``socs-monitor`` command reaches it: its options and its operations.

The agent's own modules bring SQLAlchemy, pydantic and Twisted with them, half a second of CPU. They are imported
where they are needed, since the container's health check, which asks twice a minute for years, needs none.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import threading
import urllib.error
import urllib.request
from collections.abc import Callable
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any, TypeVar

from ocs import site_config
from ocs.client_http import ControlClientError
from ocs.ocs_client import OCSClient

if TYPE_CHECKING:
    from socs_monitor.settings import Settings

T = TypeVar("T")

# Seconds in which the agent has to answer by way of the router: OCS's client would wait for ever.
_AGENT_S = 6.0

# Seconds in which the router has to answer anything at all.
_ROUTER_S = 3.0

_NO_ROUTER = "client_http.error.connection_error"

# What OCS raises where there is no site config, or one that it does not understand.
_NO_CONFIGURATION = (KeyError, RuntimeError, OSError, AssertionError)


class ClientError(Exception):
    """The agent's configuration or the agent cannot be reached; the text says what to do."""


class RouterAwayError(ClientError):
    """No router answers, so nothing is known of the agent, which needs none to register files."""


def settings_of(args: argparse.Namespace) -> Settings:
    """Return the agent's settings: from the site config if there is one, otherwise the defaults.

    Raises:
        ClientError: If there is a site config, but it has no such agent, or one with wrong options.
    """
    from socs_monitor.settings import Settings, make_parser, parse_args

    if not has_site_config(args):
        found = make_parser().parse_args([])
        found.instance_id = args.instance_id
    else:
        complaint = io.StringIO()
        try:
            with contextlib.redirect_stderr(complaint):
                found = parse_args([*_site_arguments(args), "--instance-id", args.instance_id])
        except SystemExit as error:
            reason = complaint.getvalue().strip().rpartition("error: ")[2]
            raise ClientError(f"the site config has a wrong option for {args.instance_id}: {reason}") from error
        except _NO_CONFIGURATION as error:
            raise ClientError(
                f"the site config does not tell of {args.instance_id} on this host: {error}. Name it with --site-file"
                " and --site-host, or set OCS_CONFIG_DIR"
            ) from error
    for name in ("db_path", "spool_path"):
        if getattr(args, name, None) is not None:
            setattr(found, name, getattr(args, name))
    return Settings.from_args(found)


def has_site_config(args: argparse.Namespace) -> bool:
    """Whether a site config is named; whether it can be read is another matter."""
    return args.site_file is not None or "OCS_CONFIG_DIR" in os.environ


def connect(args: argparse.Namespace) -> Any:
    """Return an OCSClient of the agent.

    Raises:
        RouterAwayError: If the router does not answer.
        ClientError: If the agent does not.
    """
    if not has_site_config(args):
        raise ClientError("where the router is, is not known: name the site config with --site-file or OCS_CONFIG_DIR")
    try:
        return OCSClient(args.instance_id, privs=_privileges(), args=_site_arguments(args))
    except _NO_CONFIGURATION as error:
        if isinstance(error, ControlClientError) and error.args[0][4] == _NO_ROUTER:
            raise RouterAwayError(f"the router does not answer ({error.args[0][5][0]})") from error
        raise ClientError(
            f"the agent {args.instance_id} does not answer over the router: {error}. Is the agent up, and does the"
            " site config name router and agent (--site-file, or OCS_CONFIG_DIR)?"
        ) from error


def session_of_run(args: argparse.Namespace) -> dict[str, Any]:
    """Return OCS's session of the agent's operation `run`, empty if that was never started.

    Raises:
        RouterAwayError: If the router does not answer in time.
        ClientError: If the agent does not.
    """

    def ask() -> dict[str, Any]:
        try:
            session: dict[str, Any] = connect(args).run.status().session
        except AttributeError as error:
            raise ClientError(f"{args.instance_id} is no PysmurfMonitor: it has no operation `run`") from error
        return session or {}

    try:
        return _within(_AGENT_S, ask)
    except TimeoutError as error:
        url = site_config.get_control_client(args.instance_id, args=_site_arguments(args)).call_url
        if not _answers(url):
            raise RouterAwayError(f"the router does not answer (asked {url} for {_AGENT_S:.0f} s)") from error
        raise ClientError(
            f"the agent {args.instance_id} does not answer within {_AGENT_S:.0f} s, though the router does"
        ) from error


def done(reply: Any) -> Any:
    """Return the reply of an operation that succeeded.

    Raises:
        ClientError: If it did not, with what it said.
    """
    if not (reply.session and reply.session.get("success")):
        raise ClientError(message(reply))
    return reply


def message(reply: Any) -> str:
    """Return what an operation said last."""
    messages = [text for _, text in (reply.session or {}).get("messages", ()) if not text.startswith("Status is now")]
    return str(messages[-1] if messages else reply.msg)


def _within(seconds: float, ask: Callable[[], T]) -> T:
    """Return what `ask` returns; raises `TimeoutError`, and leaves the question to itself, where that takes longer."""
    answer: Future[T] = Future()

    def run() -> None:
        try:
            answer.set_result(ask())
        except BaseException as error:  # noqa: BLE001 (raised again where the answer is waited for)
            answer.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return answer.result(seconds)


def _answers(url: str) -> bool:
    """Whether an HTTP server answers there; it need not like the question."""
    try:
        urllib.request.urlopen(url, timeout=_ROUTER_S).close()  # noqa: S310 (the address is the site's own)
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
    """The level to ask for: OCS reads a password from this user's file, and fails where there is none."""
    passwords = os.environ.get("OCS_PASSWORDS_FILE") or os.path.expanduser("~/.ocs-passwords.yaml")
    return 3 if os.path.exists(passwords) else 1
