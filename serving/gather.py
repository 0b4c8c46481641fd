# SPDX-License-Identifier: Apache-2.0
"""A look-up of a model in parts: its keys split by part, the parts' answers made one, of one version.

    looking_up     a generator: yields what to ask each part, is sent what they answered, returns the rows

Invariant: rows of several parts are of one run and one cut (of one run, where a job is followed). Where parts answered of
several, all are asked for the oldest, then for a newer one; if nobody has kept any of these, Unavailable: they are asked anew.
Pure, any thread.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from oarlock.embedding.partition import Grouped, grouped_by_part
from oarlock.proto.arrays import Part, pack
from oarlock.proto.bulk import Bulk, opened
from oarlock.proto.errors import Malformed, NotFound, Unavailable
from oarlock.proto.methods import PROTOCOL
from oarlock.proto.serving_pb2 import LookupRequest, ModelReply, TableLookup
from oarlock.proto.serving_pb2 import ModelVersion as VersionMessage
from oarlock.serving.asking import Question, Steps
from oarlock.serving.fleet import Fleet, ServedModel, TableForm
from oarlock.serving.lookup_wire import (
    Found,
    Keys,
    ModelVersion,
    check_tables,
    checked_keys,
    checked_version,
    kind_of,
    lookup_request,
    own,
    read_found,
    read_rows,
    read_version,
    version_message,
)
from oarlock.serving.snapshot import unknown_table

LOOKUP = "Serving.Lookup"
# (live, run, cut): what the answers of parts have to have in common; the cut of what is followed is 0.
Kind = tuple[bool, int, int]


def looking_up(
    fleet: Fleet, model: ServedModel, tables: Mapping[str, Keys], version: ModelVersion | None = None
) -> Steps[Found]:
    """Yield questions by part, be sent the answers, or have NotFound thrown in where a version is not had; return the rows.

    ``version``: of this one alone; NotFound where a part has no server that has it.
    """
    if model.parts == 1:
        request = lookup_request(tables, job=model.job, version=version)
        elsewhere = () if version is None else (NotFound,)
        answers = yield {0: Question(LOOKUP, request, sum(len(keys) for keys in tables.values()), elsewhere)}
        return checked_version(read_found(tables, answers[0]), version)
    split = _Split(model, tables)
    if version is None:
        answers = yield from of_one_version(fleet, split.parts, split.question)
    else:
        version_message(version)
        wanted = kind_of(version)
        answers = yield {part: split.question(part, wanted) for part in split.parts}
        if any(_kind(answer) != wanted for answer in answers.values()):
            raise Malformed(f"rows of another version came than {wanted}, which was asked for")
    return split.joined(answers)


def of_one_version(
    fleet: Fleet, parts: Iterable[int], question: Callable[[int, Kind | None], Question]
) -> Steps[dict[int, Any]]:
    """Yield what ``question`` says that each part is asked, of any version at first; return their answers, all of one."""
    answers = yield {part: question(part, None) for part in parts}
    versions = {part: _kind(answer) for part, answer in answers.items()}
    kinds = sorted(set(versions.values()))
    if len(kinds) == 1:
        return answers
    fleet.asked_again()
    for wanted in kinds:
        behind = [part for part, kind in versions.items() if kind != wanted]
        try:
            again = yield {part: question(part, wanted) for part in behind}
        except NotFound:
            continue
        together = {**answers, **again}
        if all(_kind(answer) == wanted for answer in together.values()):
            return together
    have = ", ".join(f"{'live ' if live else ''}run {run} cut {cut}" for live, run, cut in kinds)
    raise Unavailable(f"the parts of this model are of several versions ({have}), and have kept none that all have")


def _kind(answer: Any) -> Kind:
    return kind_of(opened(answer)[0].version)


class _Asked(NamedTuple):
    """A table that is asked for; its keys by part."""

    name: str
    form: TableForm
    keys: Grouped

    def count(self, part: int) -> int:
        return int(self.keys.starts[part + 1] - self.keys.starts[part])

    def run(self, part: int) -> slice:
        return slice(int(self.keys.starts[part]), int(self.keys.starts[part + 1]))


class _Split:
    """Keys of tables by part."""

    def __init__(self, model: ServedModel, tables: Mapping[str, Keys]) -> None:
        self._job = model.job
        self._asked: list[_Asked] = []
        for name, given in tables.items():
            form = model.tables.get(name)
            if form is None:
                raise unknown_table(name, model.tables)
            keys = checked_keys(name, given)
            self._asked.append(
                _Asked(name, form, grouped_by_part(keys, np.uint64(form.salt), form.blocks, model.parts))
            )
        # Whoever asks for nothing is told a version all the same.
        self.parts = [part for part in range(model.parts) if any(each.count(part) for each in self._asked)] or [0]

    def _of(self, part: int) -> list[_Asked]:
        return [each for each in self._asked if each.count(part)]

    def question(self, part: int, wanted: Kind | None) -> Question:
        """Return what a part is asked; ``wanted``: of this version."""
        beside: list[Part] = []
        tables = [
            TableLookup(table=each.name, keys=pack(each.keys.keys[each.run(part)], beside)) for each in self._of(part)
        ]
        request = LookupRequest(protocol=PROTOCOL, tables=tables, job=self._job)
        if wanted is not None:
            live, run, cut = wanted
            request.version.CopyFrom(VersionMessage(run=run, cut=cut, live=live))
        size = sum(each.count(part) for each in self._of(part))
        return Question(LOOKUP, Bulk(request, beside), size, () if wanted is None else (NotFound,))

    def joined(self, answers: Mapping[int, Any]) -> Found:
        """Return the rows of all parts' answers in the order of the keys; Malformed."""
        rows: dict[str, NDArray[np.float32]] = {}
        missing = dict.fromkeys((each.name for each in self._asked), 0)
        for each in self._asked:
            rows[each.name] = np.empty((len(each.keys.keys), each.form.dim), np.float32)
        versions = []
        for part, answer in answers.items():
            message, beside = opened(answer)
            of = self._of(part)
            check_tables(message, len(of))
            versions.append(read_version(message.version))
            for each, found in zip(of, message.tables, strict=True):
                values = read_rows(each.name, found, each.count(part), beside, columns=each.form.dim)
                missing[each.name] += found.missing
                if len(values) == len(each.keys.keys):
                    # All of one part, and so in their order.
                    rows[each.name] = own(values)
                else:
                    rows[each.name][each.keys.positions[each.run(part)]] = values
        return Found(rows, missing, _oldest(versions))


def _oldest(versions: list[ModelVersion]) -> ModelVersion:
    first = versions[0]
    since = max(each.seconds_since for each in versions)
    return ModelVersion(first.run, min(each.cut for each in versions), since, first.live)


def merged(model: ServedModel, replies: list[ModelReply]) -> ModelReply:
    """Return what is served of all parts, of what one server of each said."""
    whole = ModelReply(parts=1)
    whole.CopyFrom(replies[0])
    for reply in replies[1:]:
        for table, other in zip(whole.tables, reply.tables, strict=False):
            table.rows += other.rows
            table.bytes += other.bytes
        if (reply.version.run, reply.version.cut) < (whole.version.run, whole.version.cut):
            whole.version.CopyFrom(reply.version)
        whole.version.seconds_since = max(whole.version.seconds_since, reply.version.seconds_since)
    cuts = set.intersection(*(set(reply.cuts) for reply in replies))
    del whole.cuts[:]
    whole.cuts.extend(sorted(cuts))
    whole.pinned = any(reply.pinned for reply in replies)
    whole.problem = "; ".join(dict.fromkeys(reply.problem for reply in replies if reply.problem))
    whole.part, whole.parts = 0, model.parts
    return whole
