# SPDX-License-Identifier: Apache-2.0
"""A table whose rows begin with their first part alone and get the others when their score passes a threshold.

    narrow   the first part of every row, with its shows and clicks; decides admission and eviction
    wide     the other parts of those rows that got them; absent = zeros

A push whose occurrences bring (shows - clicks) * nonclick + clicks * click to ``expand_score`` or above creates the other parts,
at the first values of these columns, and is their first update; gradients for them before that are dropped. A row keeps them
until it leaves, also if its score decays. Bit for bit, an expanded row of float32 is what it would be in an ordinary table
that saw the same gradients.

Invariant: both tables hold the same blocks, and each row of ``wide`` has one in ``narrow``. Callable from any thread:
changes are made one at a time, under one lock, so a block's narrow and wide rows always fit together; pulls go on
meanwhile, and may read a row's first part after and its other parts before a change that is under way.
"""

import threading
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from oarlock.embedding.block import Block
from oarlock.embedding.content import BlockRows
from oarlock.embedding.evict import Swept
from oarlock.embedding.expanding_content import cut, joined
from oarlock.embedding.expanding_kernels import join, judge, leave_too, pack
from oarlock.embedding.expanding_parts import Narrow, Wide
from oarlock.embedding.expanding_view import ExpandingView
from oarlock.embedding.live import NO_RECORDS, Filled, LiveBlock, keys_of
from oarlock.embedding.newer import Newer
from oarlock.embedding.pointer import address_of, check_output, kernel_array
from oarlock.embedding.spec import TableSpec
from oarlock.embedding.table import NO_CLICKS, NO_OCCURRENCES, Groups, Keys, PushCounts, Values
from oarlock.proto.errors import InvalidArgument, Malformed, OutOfMemory, PSError


class ExpandingTable:
    """The rows of ``spec``, which has an ``expand_score``, in the adopted blocks. The methods are those of ``Table``."""

    def __init__(self, spec: TableSpec, *, seed: int) -> None:
        if not spec.expand_score:
            raise InvalidArgument(f"table {spec.name}: an ExpandingTable needs expand_score (make_table chooses)")
        self.spec = spec
        self.narrow = Narrow(spec, seed=seed)
        self.wide = Wide(spec, seed=seed)
        self.width = spec.parts[0].width
        self.salt, self.bits = self.narrow.salt, self.narrow.bits
        self.state_columns = self.narrow.state_columns + self.wide.state_columns
        self.counters = self.narrow.counters + 1  # the last one: 1 = the row is expanded
        self._changing = threading.Lock()
        self._scratch: NDArray[np.int64] = np.empty((3, 256), np.int64)

    # Blocks

    def adopt(self, block: int) -> None:
        """Store a block from now on, empty."""
        with self._changing:
            self.narrow.adopt(block)
            try:
                self.wide.adopt(block)
            except BaseException:
                self.narrow.drop(block)
                raise

    def drop(self, block: int) -> None:
        """Forget a block and free its memory."""
        with self._changing:
            self.narrow.drop(block)
            self.wide.drop(block)

    @property
    def owned(self) -> NDArray[np.int32]:
        """Return the stored blocks, ascending: int32[m]."""
        return self.narrow.owned

    @property
    def rows(self) -> int:
        """Return the number of rows, expanded or not."""
        return self.narrow.rows

    @property
    def expanded(self) -> int:
        """Return the number of rows that have all their parts."""
        return self.wide.rows

    @property
    def row_bytes(self) -> int:
        """Return about how many bytes of memory an expanded row takes, its part of the indexes included."""
        return self.narrow.row_bytes + self.wide.row_bytes

    @property
    def live_bytes(self) -> tuple[int, int]:
        """Return the bytes of one of a LiveBlock's records, and of one of its others."""
        return self.narrow.live_bytes[0], self.wide.live_bytes[0]

    @property
    def nbytes(self) -> int:
        """Return the bytes of memory allocated for rows, indexes and sketches."""
        return self.narrow.nbytes + self.wide.nbytes

    @property
    def descriptors(self) -> NDArray[np.int64]:
        """Return what is known of each block (``embedding/descriptor.py``), as far as its first parts tell."""
        return self.narrow.descriptors

    def version(self, block: int) -> int:
        """Return how many operations changed a stored block."""
        return self.narrow.version(block)

    def begin_view(self, number: int) -> ExpandingView:
        """Begin view ``number`` of all stored blocks, as ``Table.begin_view``."""
        with self._changing:
            return ExpandingView(self.narrow.begin_view(number), self.wide.begin_view(number), self.wide.beginning)

    def commit_view(self, number: int) -> bool:
        """Let changes count from view ``number``, as ``Table.commit_view``."""
        with self._changing:
            return self.narrow.commit_view(number) and self.wide.commit_view(number)

    # Requests

    def check(self, keys: Keys, blocks: Groups, counts: Groups, *, unique: bool = False) -> None:
        """Raise Malformed or StalePlacement unless the request can be served; ``unique``: no key twice (a push)."""
        self.narrow.check(keys, blocks, counts, unique=unique)

    def pull(self, keys: Keys, blocks: Groups, counts: Groups, out: Values) -> int:
        """Write the weights of keys: uint64[n] to out: float32[n, dim]; return how many rows are present.

        An absent key reads as the first value of its first part, or zeros if the table says so; a row that is not expanded
        reads as zeros behind its first part.
        """
        keys, blocks, counts = self.narrow._request(keys, blocks, counts)
        n = keys.shape[0]
        self._values("out", out, n)
        check_output(f"table {self.spec.name}: out", out)
        first_part = np.empty((n, self.width), np.float32)
        present = self.narrow.pull(keys, blocks, counts, first_part)
        self.wide.pull(keys, blocks, counts, out.reshape(-1)[n * self.width :].reshape(n, self.wide.spec.dim))
        join(address_of(out), n, self.spec.dim, self.width, address_of(first_part))
        return present

    def pull_newer(
        self, keys: Keys, blocks: Groups, counts: Groups, versions: NDArray[np.uint32], *, bound: int
    ) -> Newer:
        """Return the rows that who keeps these versions must get, as ``Table.pull_newer`` does."""
        with self._changing:  # a push under way has raised versions before it changes the other parts
            found = self.narrow.outdated(keys, blocks, counts, versions, bound=bound)
        rows = np.empty((len(found.keys), self.spec.dim), np.float32)
        self.pull(found.keys, found.blocks, found.counts, rows)
        return Newer(found.positions, rows, found.versions)

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
        """Apply one optimizer step with gradients: float32[n, dim], as ``Table.push`` does, to the parts that a row has.

        What is counted is rows, whatever parts they have. A key is named once: one that comes twice is judged each time by what
        that one brings.
        """
        narrow, wide, dim = self.narrow, self.wide, self.spec.dim
        keys, blocks, counts = narrow._request(keys, blocks, counts)
        n = keys.shape[0]
        self._values("gradients", gradients, n)
        gradients = kernel_array("gradients", gradients, np.float32, 2)
        occurrences = narrow._aside("occurrences", kernel_array("occurrences", occurrences, np.uint32), n)
        clicks = narrow._aside("clicks", kernel_array("clicks", clicks, np.float32), n)
        wide._rates(rate, step)  # so that both refuse what one of them would
        first_part = np.empty((n, self.width), np.float32)
        verdicts = np.empty(n, np.uint8)
        needs = np.zeros(len(blocks), np.int64)
        failure: PSError | None = None
        groups, m = len(blocks), n
        with self._changing:
            with narrow._working(n) as work:
                narrow._check_groups(work, n, blocks, counts)
            self._fit(n)
            chosen = judge(
                narrow.base,
                wide.base,
                self.salt,
                narrow.layout,
                narrow._rules,
                float(self.spec.expand_score),
                dim,
                keys,
                blocks,
                counts,
                occurrences,
                clicks,
                address_of(gradients),
                self._scratch[0],
                self._scratch[1],
                self._scratch[2],
                address_of(first_part),
                verdicts,
                needs,
            )
            # All memory is there before anything changes: what is pushed to one table must not fail in the other.
            for group in np.flatnonzero(needs).tolist():
                try:
                    with wide.holding(int(blocks[group])):
                        wide.stored(int(blocks[group])).reserve(int(needs[group]), int(needs[group]))
                except OutOfMemory as error:
                    failure, groups, m = error, group, int(counts[:group].sum())
                    break
            chosen_keys, chosen_gradients = (
                np.empty(chosen, np.uint64),
                np.empty((chosen, dim - self.width), np.float32),
            )
            chosen_blocks, chosen_counts = np.empty(groups, np.int32), np.empty(groups, np.int32)
            with wide._working(chosen):
                pass
            done = PushCounts(0, 0, 0)
            try:
                done = narrow.push(
                    keys[:m],
                    blocks[:groups],
                    counts[:groups],
                    first_part[:m],
                    rate=rate,
                    step=step,
                    tick=tick,
                    occurrences=occurrences[:m],
                    clicks=clicks[:m],
                )
            except PSError as error:
                if "groups" not in error.details:
                    raise  # nothing of it is done
                failure, groups = error, int(error.details["groups"])
            kept, in_blocks = pack(
                narrow.base,
                self.salt,
                self.width,
                dim,
                keys,
                blocks[:groups],
                counts[:groups],
                address_of(gradients),
                verdicts,
                chosen_keys,
                chosen_blocks,
                chosen_counts,
                address_of(chosen_gradients),
            )
            if kept:
                which = chosen_keys[:kept], chosen_blocks[:in_blocks], chosen_counts[:in_blocks]
                wide.push(*which, chosen_gradients[:kept], rate=rate, step=step, tick=tick)
        if failure is not None:
            failure.details.update(table=self.spec.name, groups=groups)
            raise failure
        return done

    # Rows that leave, and values that come back

    def sweep(self, block: int, *, tick: int, buckets: int = 2048) -> Swept:
        """Evict what the table's rules say from the next ``buckets`` buckets of a block's index, as ``Table.sweep``."""
        with self._changing:
            done = self.narrow.sweep(block, tick=tick, buckets=buckets)
            self._let_go(block, done.gone)
            return done

    def replay_sweep(self, block: int, gone: Keys, decayed: Keys) -> None:
        """Do to a copy of a block what a sweep did to its owner's, as ``Table.replay_sweep``."""
        with self._changing:
            self.narrow.replay_sweep(block, gone, decayed)
            self._let_go(block, kernel_array("gone", gone, np.uint64))

    def _let_go(self, block: int, gone: Keys) -> None:
        """Evict the other parts of rows whose first parts have left."""
        with self.wide.holding(block) as descriptor:
            self.wide.room_to_save(block, len(gone))
            with self.wide.shut(block):
                leave_too(descriptor, self.salt, self.wide.layout, gone)

    def tombstones(self, block: int, *, since: int = 0) -> tuple[Keys, NDArray[np.int64]] | None:
        """Return the keys that left a block after version ``since``, with versions; None: it remembers no longer so far."""
        return self.narrow.tombstones(block, since=since)

    def forget_tombstones(self, block: int, *, until: int) -> None:
        """Forget what left a block at version ``until`` or before."""
        self.narrow.forget_tombstones(block, until=until)

    def undo(self, keys: Keys, *, steps: int = 1) -> NDArray[np.int32]:
        """Refuse: such a table keeps no old values."""
        raise InvalidArgument(f"table {self.spec.name} keeps no old values: guard.undo does not go with expand_score")

    def explain(self, key: int, *, tick: int | None = None) -> dict[str, object]:
        """Return everything known of one key: ``Table.explain`` of the whole row, and how it stands with its expansion."""
        with self._changing:
            out = self.narrow.explain(key, tick=tick)
            rest = self.wide.explain(key)
        for name, size in (("weights", "norm"), ("state", "state_norm")):
            if name in out:
                values = np.array([*out[name], *rest.get(name, [])])  # type: ignore[misc]
                out |= {name: values.tolist(), size: float(np.sqrt(np.square(values).sum()))}
        out["expansion"] = {
            "expanded": rest["present"],
            "score": out.get("score"),
            "needed": self.spec.expand_score,
        }
        return out

    def refused_keys(self) -> Keys:
        """Return keys: uint64[s] whose gradients were refused, a sample of the latest."""
        return self.narrow.refused_keys()

    @property
    def refused(self) -> int:
        """Return how many gradients were refused since this table was made."""
        return self.narrow.refused

    @property
    def evicted(self) -> int:
        """Return how many rows were evicted since this table was made."""
        return self.narrow.evicted

    def close(self) -> None:
        """Give back what is not memory: nothing, so far."""
        self.narrow.close()
        self.wide.close()

    # Whole blocks

    def export_block(self, block: int) -> BlockRows:
        """Return a copy of a stored block's content, all of one instant.

        A row that is not expanded has zeros, and the state of a new row, behind its first part; the last counter tells.
        """
        with self._changing:
            first, others = self.narrow.export_block(block), self.wide.export_block(block)
        return joined(first, others, self.wide.beginning)

    def import_block(self, block: int, content: BlockRows, *, version: int = 0) -> None:
        """Store a block with exactly this content, replacing what it held; a Malformed content changes nothing.

        A content without counters, which an ordinary table may have written, is one of expanded rows.
        """
        where, columns = f"table {self.spec.name}, block {block}", self.narrow.state_columns
        sizes = {"columns": columns, "all_columns": self.state_columns, "counters": self.counters}
        first, others = cut(content, where, width=self.width, dim=self.spec.dim, **sizes)
        narrow = self.narrow._filled(block, first, version)
        self.place_live(block, self._with_wide(narrow, lambda: self.wide._filled(block, others, version)))

    def export_live(self, block: int) -> LiveBlock:
        """Return a copy of all that operations on a stored block depend on, as ``Table.export_live``."""
        with self._changing:
            return self.narrow.export_live(block)._replace(others=self.wide.export_live(block).records)

    def import_live(self, block: int, live: LiveBlock, *, version: int | None = None) -> None:
        """Store a block that is the one that ``live`` was made of, as ``Table.import_live``."""
        self.place_live(block, self.fill_live(block, live, version=version))

    def fill_live(self, block: int, live: LiveBlock, *, version: int | None = None) -> Filled:
        """Return contents made of an image, in no place yet, as ``Table.fill_live``."""
        others = LiveBlock(live.others, version=live.version)
        narrow = self.narrow._filled_live(block, live._replace(others=NO_RECORDS), version)
        filled = self._with_wide(narrow, lambda: self.wide._filled_live(block, others, version))
        if not np.isin(keys_of(live.others), keys_of(live.records)).all():
            for content in filled:
                content.free()
            raise Malformed(f"table {self.spec.name}, block {block}: a row has other parts, but no first one")
        return filled

    def _with_wide(self, narrow: Block, make_wide: Callable[[], Block]) -> Filled:
        """Return new contents of both tables; the second one may still turn out to be Malformed."""
        try:
            return narrow, make_wide()
        except BaseException:
            narrow.free()
            raise

    def place_live(self, block: int, filled: Filled) -> None:
        """Put new contents of both tables in their places."""
        with self._changing:
            for table, fresh in zip((self.narrow, self.wide), filled, strict=True):
                with table._lock:
                    table._place(block, fresh)

    def _fit(self, n: int) -> None:
        """Have scratch memory for a push of ``n`` keys; under the lock of changes."""
        if n > self._scratch.shape[1]:
            self._scratch = np.empty((3, 1 << (n - 1).bit_length()), np.int64)

    def _values(self, name: str, values: Values, n: int) -> None:
        if values.dtype != np.float32 or values.shape != (n, self.spec.dim):
            raise Malformed(
                f"table {self.spec.name}: {name} is {values.dtype}{list(values.shape)}, "
                f"expected float32[{n}, {self.spec.dim}]"
            )
