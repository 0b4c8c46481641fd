# SPDX-License-Identifier: Apache-2.0
"""How a SecuritySpec is given: by options, else by the environment, else by the job's file or folder.

Invariant: options, variables and fields are those of SecuritySpec, and hold paths, names and numbers; a secret is in none of
them.
"""

import argparse
import os
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from oarlock.proto.errors import InvalidArgument
from oarlock.proto.security import READ_REQUESTS_PER_SECOND, Security, SecuritySpec, option_of

# Of files; made absolute, so that every process of a job finds them.
PATHS = ("token_file", "tls_cert", "tls_key", "tls_ca")
_OF_SERVERS = ("mutual_tls", "read_requests_per_second", "roots")
_YES, _NO = ("1", "true", "yes"), ("", "0", "false", "no")
_HELP = {
    "token_file": ("FILE", "tokens by role; `oarlock tokens FILE` makes one"),
    "tls_cert": ("FILE", "certificate of this process (PEM), for TLS"),
    "tls_key": ("FILE", "its key (PEM), which only its owner may read"),
    "tls_ca": ("FILE", "certificates of those who sign the other side's (PEM)"),
    "tls_name": ("NAME", "what servers' certificates are for, in place of the host that is called"),
    "mutual_tls": (None, "callers have to show a certificate, too"),
    "plaintext_tokens": (None, "tokens may go to other machines without TLS"),
    "read_requests_per_second": (
        "N",
        f"of all callers of role read for each process, but look-ups (default {READ_REQUESTS_PER_SECOND:g}; 0: any number)",
    ),
    "roots": ("PATH", "where a request may name checkpoints, beside the job's own; may be repeated"),
}


def add_security(command: argparse.ArgumentParser, *, listens: bool = True) -> None:
    """Add the options of whoever listens to others, or only calls them."""
    group = command.add_argument_group("security", "docs/security.md; also as OARLOCK_TOKEN_FILE, OARLOCK_TLS_CERT ...")
    for name, (form, words) in _HELP.items():
        if name in _OF_SERVERS and not listens:
            continue
        if form is None:
            group.add_argument(option_of(name), dest=name, action="store_true", default=None, help=words)
        elif name == "roots":
            group.add_argument(option_of(name), dest=name, action="append", metavar=form, help=words)
        elif name == "read_requests_per_second":
            group.add_argument(option_of(name), dest=name, type=float, metavar=form, help=words)
        else:
            group.add_argument(option_of(name), dest=name, metavar=form, help=words)


def security_values(options: argparse.Namespace, environment: Mapping[str, str] = os.environ) -> dict[str, Any]:
    """Return the fields that options or the environment give; InvalidArgument."""
    values: dict[str, Any] = {}
    for field in fields(SecuritySpec):
        given = getattr(options, field.name, None)
        if given is None:
            given = _of_environment(field.name, environment)
        if given is not None:
            values[field.name] = tuple(given) if field.name == "roots" else given
    return settled(values)


def settled(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return fields with their paths as every process can use them, wherever it is started."""
    return {n: str(Path(v).absolute()) if n in PATHS and isinstance(v, str) and v else v for n, v in values.items()}


def security_of(options: argparse.Namespace, base: Mapping[str, Any] | None = None, *, own: bool = False) -> Security:
    """Return what options, the environment and (``base``) a job's file say, with its files read; InvalidArgument.

    ``own``: for one of the job's own processes.
    """
    return Security(SecuritySpec(**{**(base or {}), **security_values(options)}), own=own).open()


def _of_environment(name: str, environment: Mapping[str, str]) -> Any:
    variable = f"OARLOCK_{name.upper()}"
    text = environment.get(variable)
    if text is None:
        return None
    if name == "roots":
        return [each for each in text.split(os.pathsep) if each] if "://" not in text else [text]
    if name == "read_requests_per_second":
        try:
            return float(text)
        except ValueError:
            raise InvalidArgument(f"{variable}: give a number") from None
    if _HELP[name][0] is None:
        if text.lower() not in (*_YES, *_NO):
            raise InvalidArgument(f"{variable}: give 1 or 0")
        return text.lower() in _YES
    return text
