# SPDX-License-Identifier: Apache-2.0
"""Nearest rows of a model in parts: every part is asked for its own, and the best of all are the answer, of one version.

Invariant: as for look-ups (gather.py), what parts answered is of one run and one cut, or of one run where a job is followed. Each
part gives as many as are asked for, so the best of theirs are the best of all. Pure, any thread.
"""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from oarlock.embedding.partition import Grouped, grouped_by_part
from oarlock.proto.arrays import pack, unpack
from oarlock.proto.errors import NotFound
from oarlock.proto.serving_pb2 import ModelVersion as VersionMessage
from oarlock.proto.serving_pb2 import NearestRequest
from oarlock.serving.asking import Question, Steps
from oarlock.serving.fleet import Fleet, ServedModel
from oarlock.serving.gather import Kind, of_one_version
from oarlock.serving.lookup_wire import Keys, checked_keys
from oarlock.serving.nearest_wire import Neighbours, nearest_request, read_nearest
from oarlock.serving.snapshot import unknown_table
from oarlock.serving.vectors import best_of

NEAREST = "Serving.Nearest"


class Wanted(NamedTuple):
    """What is asked for, as a client's ``nearest`` has it."""

    table: str
    vectors: Any
    k: int
    exact: bool
    among: Keys | None
    without: Keys | None

    def request(self, job: str = "") -> tuple[NearestRequest, tuple[int, ...]]:
        """Return the request, and the shape of its answer."""
        only, never = (
            None if keys is None else checked_keys(f"a filter of {self.table}", keys)
            for keys in (self.among, self.without)
        )
        return nearest_request(self.table, self.vectors, self.k, exact=self.exact, among=only, without=never, job=job)


def finding(fleet: Fleet, model: ServedModel, wanted: Wanted) -> Steps[Neighbours]:
    """Yield questions by part, be sent the answers, or have NotFound thrown in where a version is not had; return the rows."""
    request, shape = wanted.request(model.job)
    if model.parts == 1:
        answers = yield {0: Question(NEAREST, request, shape[0])}
        return read_nearest(answers[0], shape)
    form = model.tables.get(wanted.table)
    if form is None:
        raise unknown_table(wanted.table, model.tables)
    # A part is asked for nothing, and told of nothing, that it has not.
    by_part: dict[str, Grouped] = {}
    for name in ("among", "without"):
        if request.HasField(name):
            keys = unpack(getattr(request, name), np.uint64, name)
            by_part[name] = grouped_by_part(keys, np.uint64(form.salt), form.blocks, model.parts)
            request.ClearField(name)

    def question(part: int, kind: Kind | None) -> Question:
        asked = NearestRequest()
        asked.CopyFrom(request)
        for name, keys in by_part.items():
            getattr(asked, name).CopyFrom(pack(_of(keys, part)))
        if kind is not None:
            live, run, cut = kind
            asked.version.CopyFrom(VersionMessage(run=run, cut=cut, live=live))
        return Question(NEAREST, asked, shape[0], () if kind is None else (NotFound,))

    parts = list(range(model.parts))
    if "among" in by_part:
        # Whoever asks among no keys is told a version all the same.
        parts = [part for part in parts if len(_of(by_part["among"], part))] or [0]
    answers = yield from of_one_version(fleet, parts, question)
    return best_of_all([read_nearest(answer, shape) for answer in answers.values()], shape[1])


def _of(keys: Grouped, part: int) -> NDArray[np.uint64]:
    return keys.keys[int(keys.starts[part]) : int(keys.starts[part + 1])]


def best_of_all(found: list[Neighbours], k: int) -> Neighbours:
    """Return the ``k`` best of what parts found, none of which has a key of another one."""
    # Behind the last that there is are scores of -inf, which are none.
    best = best_of(
        np.concatenate([each.keys for each in found], 1), np.concatenate([each.scores for each in found], 1), k
    )
    run, cut, _ = found[0].version
    return Neighbours(
        *best, (run, min(cut, *(each.version[1] for each in found)), max(each.version[2] for each in found))
    )
