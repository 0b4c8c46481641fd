# SPDX-License-Identifier: Apache-2.0
"""Files of tokens: what is one, what is refused, and that nobody sees a secret by accident."""

import copy
import hmac
import os
import pickle

import pytest
from security_rig import opened, texts_of, write_tokens

from oarlock.proto import tokens as module
from oarlock.proto.errors import InvalidArgument
from oarlock.proto.roles import ADMIN, EVERYBODY, READ, ROLES, TRAIN
from oarlock.proto.tokens import Secret, new_tokens, read_tokens

GOOD = "abcdefghijklmnopqrstuvwxyz0123456789"


def test_a_new_file_has_a_token_of_each_role(tmp_path):
    found = read_tokens(write_tokens(tmp_path / "t"))
    assert set(found.of) == set(ROLES)
    texts = texts_of(tmp_path / "t")
    assert len(set(texts.values())) == 3
    assert all(found.role_of(text.encode()) == role for role, text in texts.items())
    assert new_tokens() != new_tokens()


def test_what_is_no_token_stands_for_no_role(tmp_path):
    found = read_tokens(write_tokens(tmp_path / "t"))
    text = texts_of(tmp_path / "t")[ADMIN].encode()
    wrong = (b"", text[:-1], text + b"x", text.swapcase(), b" " + text, b"\xff" * 40, b"x" * (1 << 20))
    assert [found.role_of(each) for each in wrong] == [None] * len(wrong)


def test_every_token_is_compared_with_what_is_presented_whatever_is_found(tmp_path, monkeypatch):
    """Else the time of an answer would tell whose token begins alike, or how many there are before it."""
    found = read_tokens(write_tokens(tmp_path / "t"))
    compared = []

    def counted(one, other):
        compared.append(len(one))
        return hmac.compare_digest(one, other)

    monkeypatch.setattr(module, "hmac", type("M", (), {"compare_digest": staticmethod(counted)}))
    for presented in (*(t.encode() for t in texts_of(tmp_path / "t").values()), b"", b"none"):
        compared.clear()
        found.role_of(presented)
        assert compared == [32] * len(ROLES)


def test_a_secret_shows_itself_nowhere(tmp_path):
    secret = Secret(GOOD)
    shown = [repr(secret), str(secret), f"{secret}", "%s %r" % (secret, secret), repr([secret])]  # noqa: UP031
    shown.append(repr(read_tokens(write_tokens(tmp_path / "t", f'train = "{GOOD}"'))))
    shown.append(repr(vars(opened(token_file=tmp_path / "t"))))
    assert not any(GOOD in each for each in shown)
    for write in (pickle.dumps, copy.deepcopy):
        with pytest.raises(TypeError, match="not written down"):
            write(secret)


def test_of_several_tokens_the_first_is_used_and_all_are_taken(tmp_path):
    old, new = "o" + GOOD, "n" + GOOD
    found = read_tokens(write_tokens(tmp_path / "t", f'train = ["{new}", "{old}"]\nread = "{GOOD}"'))
    assert [found.role_of(t.encode()) for t in (old, new, GOOD)] == [TRAIN, TRAIN, READ]
    assert found.first({TRAIN}).reveal() == new
    assert found.first(EVERYBODY).reveal() == GOOD
    assert found.first({ADMIN}) is None


@pytest.mark.parametrize(
    "text",
    [
        "",
        "train = 1",
        "train = []",
        "train = ''",
        'train = "short"',
        'train = "' + "a" * 40 + '"',
        'train = "' + "0123456789abcdef" + "0123456789abcde" + '"',
        'train = "' + "a b" * 20 + '"',
        'train = "' + "é" * 40 + '"',
        'train = "' + GOOD * 20 + '"',
        f'train = "{GOOD}"\nread = "{GOOD}"',
        f'train = "{GOOD}"\nroot = "x"',
        f'{GOOD} = "train"',
        f"train = {GOOD}",
        f'train = "{GOOD}',
        f'[train]\na = "{GOOD}"',
        "train = [" + ",".join(f'"{i}{GOOD}"' for i in range(9)) + "]",
        "train = " + "[" * 5000,
        "#" * (1 << 17),
        "\0",
    ],
)
def test_a_file_that_is_none_is_refused_by_name_and_not_quoted(tmp_path, text):
    path = write_tokens(tmp_path / "tokens", text)
    with pytest.raises(InvalidArgument, match="token file") as refused:
        read_tokens(path)
    assert str(path) in refused.value.message
    assert GOOD[:8] not in refused.value.message


@pytest.mark.parametrize("mode", [0o644, 0o640, 0o604, 0o660, 0o620, 0o610])
def test_a_file_that_others_can_read_or_write_is_refused(tmp_path, mode):
    path = write_tokens(tmp_path / "t", mode=mode)
    with pytest.raises(InvalidArgument, match=r"by others .*chmod 600"):
        read_tokens(path)


def test_what_is_no_regular_file_of_ours_is_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "pipe", 0o600)
    (tmp_path / "folder").mkdir(mode=0o700)
    (tmp_path / "loop").symlink_to("loop")
    for name in ("pipe", "folder", "loop", "missing"):
        with pytest.raises(InvalidArgument, match=rf"token file .*{name}"):
            read_tokens(tmp_path / name)
    with pytest.raises(InvalidArgument, match="no regular file"):
        read_tokens(tmp_path / "pipe")


def test_a_file_of_somebody_else_is_refused(tmp_path, monkeypatch):
    path = write_tokens(tmp_path / "t")
    if os.getuid() == 0:
        os.chown(path, 12345, -1)
    else:
        mine = os.geteuid()
        monkeypatch.setattr("oarlock.proto.watched.os.geteuid", lambda: mine + 1)
    with pytest.raises(InvalidArgument, match="belongs to user"):
        read_tokens(path)


def test_a_newer_file_takes_the_place_of_the_one_before_and_a_bad_one_does_not(tmp_path, caplog):
    path = write_tokens(tmp_path / "t")
    first = texts_of(path)[ADMIN].encode()
    security = opened(look_seconds=0.0, token_file=path)
    assert security.tokens.role_of(first) == ADMIN
    write_tokens(path, f'admin = "{GOOD}"')
    assert (security.tokens.role_of(first), security.tokens.role_of(GOOD.encode())) == (None, ADMIN)
    for spoil in (lambda: path.write_text("admin = "), lambda: path.chmod(0o644), path.unlink):
        spoil()
        assert security.tokens.role_of(GOOD.encode()) == ADMIN
        assert security.tokens.role_of(GOOD.encode()) == ADMIN
    refused = [r for r in caplog.records if "file_refused" in r.message]
    assert len(refused) == 3, "each once"
    assert GOOD not in caplog.text
    write_tokens(path)
    assert security.tokens.role_of(texts_of(path)[ADMIN].encode()) == ADMIN
