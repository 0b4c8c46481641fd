# SPDX-License-Identifier: Apache-2.0
"""A table: rows by key, in the blocks that this process stores.

Invariant: a pull creates nothing; a row starts at its first value and changes by pushes, imports, evictions and undo only;
each result is a pure function of the block and the request, whatever the split into requests. Callable from any thread:
one kernel call serves a request, requests run side by side, and only those that meet in one block wait, for as long as
the other one's run of keys in that block takes (``embedding/lock.py``).

Keys arrive grouped by block: ``blocks`` names the blocks, ``counts`` how many of the keys belong to each, in order.
"""

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from oarlock.embedding import check
from oarlock.embedding.admission import Rules
from oarlock.embedding.aim import addresses
from oarlock.embedding.newer import Newer, Outdated, check_kept, outdated
from oarlock.embedding.optimizers import optimizer_of
from oarlock.embedding.pointer import address_of, check_output, kernel_array
from oarlock.embedding.policy import ADMISSIONS
from oarlock.embedding.pull import FILED, PRESENT, pull_rows
from oarlock.embedding.push import (
    APPLIED,
    COLUMN,
    CREATED,
    DONE,
    GROUP,
    HYPER,
    IN_FILE,
    NEED,
    NO_ROOM,
    NOT_SAVED,
    OVER_BUDGET,
    PART_FIELDS,
    PASSES,
    REFUSED,
    STATE,
    UPDATE,
    WAITING,
    WIDTH,
    WORDS,
    Outcome,
    Parts,
    push_rows,
)
from oarlock.embedding.refusal import limit_bits
from oarlock.embedding.regularise import passes
from oarlock.embedding.request import Request, Workspace
from oarlock.embedding.spec import TableSpec
from oarlock.embedding.upkeep import Upkeep
from oarlock.proto.errors import InvalidArgument, Malformed, OutOfMemory, PSError

Keys = NDArray[np.uint64]
Groups = NDArray[np.int32]
Values = NDArray[np.float32]

NO_OCCURRENCES: NDArray[np.uint32] = np.zeros(0, np.uint32)
NO_CLICKS: NDArray[np.float32] = np.zeros(0, np.float32)
# A rate of this size takes a row to infinity in a few steps, and such a row can be neither moved nor restored.
RATE_LIMIT = 1e15
KEPT_KEYS = 1 << 17  # scratch for requests of so many keys is kept

_NO_PLACES: NDArray[np.int32] = np.zeros(0, np.int32)


class PushCounts(NamedTuple):
    """What a push did: rows updated, those of them that are new, gradients refused, and keys not admitted (yet)."""

    applied: int
    created: int
    refused: int
    waiting: int = 0


class Table(Upkeep):
    """The rows of ``spec`` in the adopted blocks. ``seed`` is the job's; cold rows are spilled into ``spill_folder``."""

    def __init__(self, spec: TableSpec, *, seed: int, spill_folder: Path | None = None) -> None:
        super().__init__(spec, seed=seed, spill_folder=spill_folder)
        if spec.expand_score:
            raise InvalidArgument(f"table {spec.name}: expand_score needs an ExpandingTable (make_table chooses)")
        self._optimizers = [optimizer_of(part.optimizer) for part in spec.all_parts]
        self._hyper = [o.hyper(p.optimizer) for o, p in zip(self._optimizers, spec.all_parts, strict=True)]
        self._lines: NDArray[np.int64] = np.zeros((len(spec.all_parts), PART_FIELDS), np.int64)
        self._parts = Parts(len(spec.all_parts), address_of(self._lines))
        column = state = 0
        for line, part, optimizer, hyper in zip(
            self._lines, spec.all_parts, self._optimizers, self._hyper, strict=True
        ):
            line[UPDATE] = optimizer.update.address
            line[COLUMN] = column
            line[STATE] = state
            line[WIDTH] = part.width
            line[HYPER] = address_of(hyper)
            line[PASSES] = passes(part.optimizer)
            column += part.width
            state += optimizer.state_columns(part.width)
        admission = spec.admission
        self._rules = Rules(
            ADMISSIONS.index(admission.kind),
            admission.occurrences,
            float(admission.probability),
            float(admission.nonclick),
            float(admission.click),
            limit_bits(spec.guard.limit),
            spec.memory_bytes > 0,
            self._most_rows(),
        )
        self._workspaces: list[Workspace] = []
        self._sample: deque[int] = deque(maxlen=spec.guard.sample)
        self.refused = 0  # gradients, since this table was made

    # Requests

    def check(self, keys: Keys, blocks: Groups, counts: Groups, *, unique: bool = False) -> None:
        """Raise Malformed or StalePlacement unless the request can be served; ``unique``: no key twice (a push).

        Pull and push check only what keeps memory safe; a caller that did not group the keys itself calls this first.
        """
        keys, blocks, counts = self._request(keys, blocks, counts)
        with self._working(keys.shape[0]) as work:
            self._check_groups(work, keys.shape[0], blocks, counts)
        fault = np.zeros(1, np.int64)
        places = np.zeros(2 << keys.shape[0].bit_length(), np.int32) if unique else _NO_PLACES
        code = check.check_keys(self.salt, self.bits, keys, blocks, counts, places, fault)
        if code != check.FINE:
            at = int(fault[0])
            fact = "does not hash to the block it is sent for" if code == check.WRONG_BLOCK else "comes twice in a push"
            raise Malformed(
                f"table {self.spec.name}: key {int(keys[at])} at position {at} {fact}; "
                "group and merge keys with KeySorter",
                table=self.spec.name,
            )

    def pull(self, keys: Keys, blocks: Groups, counts: Groups, out: Values) -> int:
        """Write the weights of keys: uint64[n] to out: float32[n, dim]; return how many rows are present.

        An absent key reads as its first value, or zeros if the table says so, and stays absent.
        """
        keys, blocks, counts = self._request(keys, blocks, counts)
        n = keys.shape[0]
        self._values("out", out, n)
        check_output(f"table {self.spec.name}: out", out)
        with self._working(n) as work:
            self._check_groups(work, n, blocks, counts)
            pinned = self._cold.pin() if self._cold is not None else None
            try:
                missing = self._pull_rows(keys, blocks, counts, work, out)
                if self._cold is not None and pinned is None and work.found[FILED]:
                    # The file came to be between the pin and the look: look again under a pin.
                    pinned = self._cold.pin()
                    missing = self._pull_rows(keys, blocks, counts, work, out)
                if missing >= 0:
                    self.stale(int(blocks[missing]))
                filed = int(work.found[FILED])
                if self._cold is not None and filed:
                    where, records = work.cold[:filed].copy(), work.records[:filed].copy()
                    self._cold.read_weights(keys[where], where, records, out)
                    with suppress(PSError, MemoryError):
                        self._cold.spill_over(blocks)
            finally:
                if self._cold is not None and pinned is not None:
                    self._cold.unpin(pinned)
            return int(work.found[PRESENT]) + filed

    def _pull_rows(self, keys: Keys, blocks: Groups, counts: Groups, work: Workspace, out: Values) -> int:
        return int(
            pull_rows(
                self.base,
                self.salt,
                self.layout,
                self.first,
                self.spec.absent == "zeros",
                self._cold is not None,
                keys,
                blocks,
                counts,
                work.pull,
                out,
            )
        )

    def pull_newer(
        self, keys: Keys, blocks: Groups, counts: Groups, versions: NDArray[np.uint32], *, bound: int
    ) -> Newer:
        """Return those rows that who keeps versions: uint32[n] of them (0: none) must get: absent ones, and ones whose version is
        more than ``bound`` (at most the cache's) above that, or below."""
        found = self.outdated(keys, blocks, counts, versions, bound=bound)
        rows = np.empty((len(found.keys), self.spec.dim), np.float32)
        self.pull(found.keys, found.blocks, found.counts, rows)
        return Newer(found.positions, rows, found.versions)

    def outdated(
        self, keys: Keys, blocks: Groups, counts: Groups, versions: NDArray[np.uint32], *, bound: int
    ) -> Outdated:
        """Return which rows ``pull_newer`` returns, with their versions; pulled afterwards, they are at least as new."""
        keys, blocks, counts = self._request(keys, blocks, counts)
        n = keys.shape[0]
        versions = check_kept(self, n, versions, bound)
        with self._working(n) as work:
            self._check_groups(work, n, blocks, counts)
            if self._cold is not None:
                # A row's version is in its record. What cannot come back is sent, and says itself why if it cannot be read.
                with suppress(PSError, MemoryError):
                    self._cold.bring_back_request(addresses(keys, blocks, counts))
            found = outdated(self, keys, blocks, counts, versions, bound, work.pull)
            if self._cold is not None:
                with suppress(PSError, MemoryError):
                    self._cold.spill_over(blocks)
            return found

    def push(
        self,
        keys: Keys,
        blocks: Groups,
        counts: Groups,
        gradients: Values,
        *,
        rate: float,
        step: int = 1,
        tick: int = 0,
        occurrences: NDArray[np.uint32] = NO_OCCURRENCES,
        clicks: NDArray[np.float32] = NO_CLICKS,
    ) -> PushCounts:
        """Apply one optimizer step with gradients: float32[n, dim]; admitted keys get rows at their first value.

        ``rate`` is the learning rate before the table's schedule, ``step`` the job's step, from 1, ``tick``
        the step from which on the rows' age counts, if that is later: nothing else depends on it. occurrences: uint32[n] and
        clicks: float32[n] say how often each key came in the batch, and with how many clicks (default: once, none).
        A row whose gradient holds an infinity, NaN or a value beyond the table's limit is refused: neither changed nor
        created. An error in the middle names ``groups``: so many blocks of the request are done, the others untouched.
        """
        keys, blocks, counts = self._request(keys, blocks, counts)
        n = keys.shape[0]
        self._values("gradients", gradients, n)
        gradients = kernel_array("gradients", gradients, np.float32, 2)
        rates = self._rates(rate, step)
        step = int(step)
        occurrences = self._aside("occurrences", kernel_array("occurrences", occurrences, np.uint32), n)
        clicks = self._aside("clicks", kernel_array("clicks", clicks, np.float32), n)
        if len(clicks) and (not np.isfinite(clicks).all() or (clicks < 0).any()):
            raise InvalidArgument(f"table {self.spec.name}: clicks must be finite and >= 0")
        tick = min(max(step, tick), 0xFFFFFFFF)
        request = Request(
            address_of(gradients),
            address_of(occurrences) if len(occurrences) else 0,
            address_of(clicks) if len(clicks) else 0,
            address_of(rates),
            step,
            tick,
        )
        with self._working(n) as work:
            self._check_groups(work, n, blocks, counts)
            progress = np.zeros(WORDS, np.int64)
            sample = np.empty(min(n, self.spec.guard.sample), np.uint64)
            outcome = Outcome(address_of(progress), address_of(sample), len(sample))
            looked = False
            while True:
                code = push_rows(
                    self.base,
                    self.salt,
                    self.layout,
                    self.first,
                    self._rules,
                    self._parts,
                    keys,
                    blocks,
                    counts,
                    request,
                    work.push,
                    outcome,
                )
                if code == DONE:
                    break
                group, need = int(progress[GROUP]), int(progress[NEED])
                block = int(blocks[group])
                try:
                    if code == NO_ROOM:
                        self._make_room(block, need)
                    elif code == OVER_BUDGET:
                        self._make_way(block, need, int(counts[group]))
                    elif code == NOT_SAVED:
                        self.room_to_push(blocks[group:], counts[group:], need)
                    elif code == IN_FILE and self._cold is not None and not looked:
                        # All that the request names at once. Mostly there is nothing: a pull of its keys came before.
                        self._cold.bring_back_request(addresses(keys, blocks, counts))
                        looked = True
                    elif code == IN_FILE and self._cold is not None:
                        with self.holding(block):
                            self.stored(block)
                            self._cold.bring_back(block, keys[work.cold[:need]])
                    else:
                        self.stale(block)
                except (PSError, MemoryError, OSError) as error:
                    raise self._part_done(error, group, progress, sample) from None
        self._count_refused(progress, sample)
        if self._cold is not None:
            try:
                self._cold.spill_over(blocks)
                self._cold.tidy()
            except Exception as error:
                raise self._part_done(error, len(blocks), np.zeros(WORDS, np.int64), sample) from None
        return PushCounts(*(int(progress[word]) for word in (APPLIED, CREATED, REFUSED, WAITING)))

    def _count_refused(self, progress: NDArray[np.int64], sample: Keys) -> None:
        # A ring for each push: two of them at once, or one after the other, would write over each other's.
        refused = int(progress[REFUSED])
        with self._tally:
            self.refused += refused
            self._sample.extend(sample[:refused].tolist())

    def _part_done(self, error: Exception, groups: int, progress: NDArray[np.int64], sample: Keys) -> PSError:
        """Return the error of a push that ended early; the caller must know what of it is done, to send only the rest."""
        self._count_refused(progress, sample)
        if not isinstance(error, PSError):
            error = OutOfMemory(f"table {self.spec.name}: a push ended early: {str(error) or type(error).__name__}")
        error.details.update(table=self.spec.name, groups=groups)
        return error

    def refused_keys(self) -> Keys:
        """Return keys: uint64[s] whose gradients were refused, a sample of the latest."""
        return np.array(list(self._sample), np.uint64)

    # Inside

    def _rates(self, rate: float, step: int) -> NDArray[np.float64]:
        if isinstance(step, bool) or not isinstance(step, int | np.integer) or not 0 <= step < 1 << 62:
            raise InvalidArgument(f"table {self.spec.name}: step = {step!r}: give an integer from 0 to 2^62 - 1")
        rate = float(rate)
        if not abs(rate) < RATE_LIMIT:
            raise InvalidArgument(
                f"table {self.spec.name}: rate = {rate}: give a number of a size below {RATE_LIMIT:g}"
            )
        return np.array([rate * part.optimizer.schedule.factor(step) for part in self.spec.all_parts], np.float64)

    def _aside(self, name: str, values: NDArray[Any], n: int) -> NDArray[Any]:
        if values.shape[0] not in (0, n):
            raise Malformed(f"table {self.spec.name}: {values.shape[0]} {name} for {n} keys")
        return values

    @contextmanager
    def _working(self, n: int) -> Iterator[Workspace]:
        """Lend scratch memory for a request of ``n`` keys."""
        try:
            work = self._workspaces.pop() if n <= KEPT_KEYS else Workspace(self.spec.blocks, self.layout.dim)
        except IndexError:
            work = Workspace(self.spec.blocks, self.layout.dim)
        work.fit(n)
        try:
            yield work
        finally:
            # A request far larger than others shall not keep its scratch for ever.
            if n <= KEPT_KEYS:
                self._workspaces.append(work)

    def _request(self, keys: Keys, blocks: Groups, counts: Groups) -> tuple[Keys, Groups, Groups]:
        keys = kernel_array("keys", keys, np.uint64)
        blocks = kernel_array("blocks", blocks, np.int32)
        counts = kernel_array("counts", counts, np.int32)
        if blocks.shape != counts.shape:
            raise Malformed(f"table {self.spec.name}: {blocks.shape[0]} blocks but {counts.shape[0]} counts")
        return keys, blocks, counts

    def _values(self, name: str, values: Values, n: int) -> None:
        if values.dtype != np.float32 or values.shape != (n, self.spec.dim):
            raise Malformed(
                f"table {self.spec.name}: {name} is {values.dtype}{list(values.shape)}, "
                f"expected float32[{n}, {self.spec.dim}]"
            )

    def _check_groups(self, work: Workspace, n: int, blocks: Groups, counts: Groups) -> None:
        code = check.check_groups(self.descriptors, n, blocks, counts, work.seen, work.fault)
        if code == check.FINE:
            return
        fault = int(work.fault[0])
        if code == check.WRONG_SUM:
            raise Malformed(f"table {self.spec.name}: counts add up to {fault}, but there are {n} keys")
        block = int(blocks[fault])
        if code == check.NOT_STORED:
            self.stale(block)
        facts = {
            check.OUT_OF_RANGE: f"block {block} is not in [0, {self.spec.blocks})",
            check.BAD_COUNT: f"the count of block {block} is {int(counts[fault])}, expected 1 or more",
            check.REPEATED_BLOCK: f"block {block} comes twice",
        }
        raise Malformed(f"table {self.spec.name}: {facts[code]}", table=self.spec.name, block=block)
