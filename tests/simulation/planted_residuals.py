# SPDX-License-Identifier: Apache-2.0
"""Bugs of error feedback, planted on purpose as in planted.py. Only jobs whose pushes leave something out can show them."""

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from oarlock.client import client as clients
from oarlock.client import encoding, push
from oarlock.client.client import Client
from oarlock.client.feedback import SplitFeedback
from oarlock.cluster.work import Work
from oarlock.embedding.compress_residuals import Residuals
from oarlock.proto.errors import PSError
from oarlock.worker.splits import OpenSplit
from oarlock.worker.trainer import Trainer

Patch = pytest.MonkeyPatch


def _never_refused(patch: Patch) -> None:
    """Who makes such a mistake has not thought of the order of groups either."""
    patch.setattr(SplitFeedback, "begin", lambda self, group: None)


def kept_across_splits(patch: Patch) -> None:
    """A worker keeps one rest for all of its splits."""
    _never_refused(patch)
    original = Client.new_feedback

    def new_feedback(self: Client) -> Any:
        if "feedback" not in self.__dict__:
            self.__dict__["feedback"] = original(self)
        return self.__dict__["feedback"]

    patch.setattr(Client, "new_feedback", new_feedback)


def handed_to_the_successor(patch: Patch) -> None:
    """A split that another worker takes over goes on with what the one before it kept."""
    _never_refused(patch)
    known: dict[tuple[Any, int], Any] = {}
    original = Trainer._open_split

    async def open_split(self: Trainer, split: int, fresh: bool) -> OpenSplit:
        opened = await original(self, split, fresh)
        # One job after the other: each has a coordinator's transport of its own.
        job = self._session.member.transport._wire  # type: ignore[attr-defined]
        opened.feedback = known.setdefault((job, split), opened.feedback)
        return opened

    patch.setattr(Trainer, "_open_split", open_split)


def made_again_at_a_retry(patch: Patch) -> None:
    """What could not be sent is encoded once more, with a rest that it is in already."""
    _never_refused(patch)
    makes: dict[int, Callable[[], Any]] = {}
    cut, exchange = push.cut_push, push.exchange

    def cut_push(*arguments: Any, **named: Any) -> Any:
        layout, routes, identity, gradients, dense, rate = arguments
        rows = {name: replace(part, gradients=part.gradients.copy()) for name, part in gradients.items()}
        kept = (layout, routes, identity, rows, dense.copy(), rate)
        made = cut(*arguments, **named)
        makes.clear()
        makes.update({id(m): lambda at=at: cut(*kept, **named)[at] for at, m in enumerate(made)})
        return made

    async def exchanged(member: Any, messages: Any, send: Any, recut: Any) -> None:
        again = {id(message): makes[id(message)] for message in messages if id(message) in makes}

        async def resend(message: Any, timeout: float) -> Any:
            try:
                return await send(message, timeout)
            except PSError:
                if id(message) in again:
                    made = again[id(message)]()
                    message.request.CopyFrom(made.request)
                    message.parts[:] = made.parts
                raise

        await exchange(member, messages, resend, recut)

    patch.setattr(clients, "cut_push", cut_push)
    patch.setattr(push, "exchange", exchanged)


def last_group_sent_with_loss(patch: Patch) -> None:
    """What is kept after the last group never goes anywhere."""
    original = encoding.PushEncoder.__init__

    def init(self: Any, forms: Any, routes: Any, identity: Any, feedback: Any, last: bool) -> None:
        original(self, forms, routes, identity, feedback, last=False)

    patch.setattr(encoding.PushEncoder, "__init__", init)


def last_group_brings_its_own_keys_only(patch: Patch) -> None:
    """What is kept of keys that the last group has not is forgotten."""
    original = SplitFeedback.drain

    def drain(self: SplitFeedback, table: str, part: Any, *about: Any) -> Any:
        merged = original(self, table, part, *about)
        rows = np.searchsorted(np.sort(merged.keys.keys), part.keys.keys)
        return replace(part, gradients=merged.gradients[np.argsort(merged.keys.keys)[rows]])

    patch.setattr(SplitFeedback, "drain", drain)


def rest_of_rows_added_twice(patch: Patch) -> None:
    """The last group brings what is kept of its keys once for the group and once for the split."""
    original = Residuals.drain

    def drain(self: Residuals) -> Any:
        keys, values = original(self)
        return keys, 2 * values

    patch.setattr(Residuals, "drain", drain)


def rest_of_dense_values_added_twice(patch: Patch) -> None:
    original = SplitFeedback._with_kept

    def with_kept(self: SplitFeedback, gradients: Any, lengths: Any, limit: float) -> Any:
        first, _ = original(self, gradients, lengths, limit)
        return original(self, first, lengths, limit)

    patch.setattr(SplitFeedback, "_with_kept", with_kept)


def rest_of_dense_values_is_not_what_was_left(patch: Patch) -> None:
    """The rest is taken of the gradient alone, and what was kept before is lost."""
    original = SplitFeedback.dense

    def dense(self: SplitFeedback, form: Any, gradients: Any, lengths: Any) -> Any:
        before = copy.copy(self)
        out = original(before, form, gradients, lengths)
        self._dense = None
        original(self, form, gradients, lengths)
        return out

    patch.setattr(SplitFeedback, "dense", dense)


def encoded_as_they_are_computed(patch: Patch) -> None:
    """Groups that compute at once do not wait for each other with what is encoded."""
    _never_refused(patch)
    patch.setattr(OpenSplit, "encoded", property(lambda self: None, lambda self, turn: None), raising=False)


def losses_are_not_told(patch: Patch) -> None:
    """A split that comes back unfinished is not counted."""
    original = Work.release

    def release(self: Work, worker: int, kind: str, split: int, reason: str) -> bool:
        before = self.given_back
        heard = original(self, worker, kind, split, reason)
        self.given_back = before
        return heard

    patch.setattr(Work, "release", release)


def losses_are_told_of_every_split(patch: Patch) -> None:
    """A split that is closed counts as one that came back, too."""
    original = Work.close

    def close(self: Work, *arguments: Any) -> bool:
        self.given_back += 1
        return original(self, *arguments)

    patch.setattr(Work, "close", close)


PLANTED: tuple[Callable[[Patch], None], ...] = (
    kept_across_splits,
    handed_to_the_successor,
    made_again_at_a_retry,
    last_group_sent_with_loss,
    last_group_brings_its_own_keys_only,
    rest_of_rows_added_twice,
    rest_of_dense_values_added_twice,
    rest_of_dense_values_is_not_what_was_left,
    encoded_as_they_are_computed,
    losses_are_not_told,
    losses_are_told_of_every_split,
)
