# SPDX-License-Identifier: Apache-2.0
"""Tokens: secrets that stand for a role, as a file gives them; how one is recognised.

    train = "..."              # the first is used for calls
    read = ["...", "..."]      # the others are taken, too: so one is replaced without a pause

Invariant: a secret has no form that prints it; `role_of` compares what is presented with every secret there is, in the same
time whether and where it is found. Errors name the file and the role, never what is written there. Any thread.
"""

import hmac
import re
import secrets
import tomllib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from oarlock.proto.errors import InvalidArgument
from oarlock.proto.roles import ROLES
from oarlock.proto.watched import read_secret_file

# Bits that nobody guesses, in what a header can carry (RFC 6750): 22 characters of 64, or 32 hexadecimal digits.
_TEXT = re.compile(r"[A-Za-z0-9\-._~+/]{22,512}={0,2}")
_HEXADECIMAL = re.compile(r"[0-9a-fA-F]{0,31}")
_DISTINCT = 8
MAX_FILE_BYTES = 1 << 16
# Of one role: the one that is used, the one before it, and room to spare.
MAX_OF_ROLE = 8
_MADE_BYTES = 32


class Secret:
    """A text that nobody sees by accident."""

    __slots__ = ("_text", "digest")

    def __init__(self, text: str) -> None:
        self._text = text
        self.digest = sha256(text.encode()).digest()

    def reveal(self) -> str:
        """Return the text, for the one place that sends it."""
        return self._text

    def __repr__(self) -> str:
        return "Secret(...)"

    def __reduce__(self) -> str:
        raise TypeError("a secret is not written down")


@dataclass(frozen=True)
class Tokens:
    """Secrets by role, the one that is used first."""

    of: Mapping[str, tuple[Secret, ...]]

    def role_of(self, presented: bytes) -> str | None:
        """Return the role that a text stands for, None if it is no token."""
        digest = sha256(presented).digest()
        found = 0
        known = [(role, secret) for role, kept in self.of.items() for secret in kept]
        for number, (_, secret) in enumerate(known, 1):
            # All of them, also once it is found.
            found += number * hmac.compare_digest(digest, secret.digest)
        return known[found - 1][0] if found else None

    def first(self, roles: Collection[str], order: Sequence[str] = ROLES) -> Secret | None:
        """Return the token that is used for what ``roles`` may do: of those that there are, the first in ``order``."""
        return next((self.of[role][0] for role in order if role in roles and self.of.get(role)), None)


def read_tokens(path: Path) -> Tokens:
    """Return the tokens in a file; InvalidArgument says what is wrong with it, but for the secrets."""
    data = read_secret_file(path, "token file", MAX_FILE_BYTES)
    try:
        values = tomllib.loads(data.decode())
    except (UnicodeDecodeError, tomllib.TOMLDecodeError, RecursionError):
        # The parser's own words would quote the file.
        raise InvalidArgument(f'token file {path} is no TOML file: give lines like {ROLES[0]} = "..."') from None
    unknown = sorted(name[:40] for name in values if name not in ROLES)
    if unknown:
        # A secret may have been written where the name belongs.
        raise InvalidArgument(
            f"token file {path} has {len(unknown)} names that are no roles: there are {', '.join(ROLES)}"
        )
    of = {role: _secrets(path, role, values[role]) for role in ROLES if role in values}
    if not of:
        raise InvalidArgument(f"token file {path} holds no token: give one for each of {', '.join(ROLES)}, or for some")
    digests = [secret.digest for kept in of.values() for secret in kept]
    if len(set(digests)) < len(digests):
        raise InvalidArgument(f"token file {path} has the same token twice: each stands for one role")
    return Tokens(of)


def _secrets(path: Path, role: str, value: object) -> tuple[Secret, ...]:
    texts = value if isinstance(value, list) else [value]
    if not 1 <= len(texts) <= MAX_OF_ROLE:
        raise InvalidArgument(f"token file {path}: {role} has {len(texts)} tokens, give 1 to {MAX_OF_ROLE}")
    for text in texts:
        if (
            not isinstance(text, str)
            or not _TEXT.fullmatch(text)
            or _HEXADECIMAL.fullmatch(text)
            or len(set(text)) < _DISTINCT
        ):
            raise InvalidArgument(
                f"token file {path}: a token of {role} is none: give at least 22 random characters (32 if hexadecimal) of "
                "A-Z a-z 0-9 - . _ ~ + /; `oarlock tokens FILE` makes such a file"
            )
    return tuple(map(Secret, texts))


def new_tokens() -> str:
    """Return the text of a file with a new token for each role."""
    return "".join(f'{role} = "{secrets.token_urlsafe(_MADE_BYTES)}"\n' for role in ROLES)
