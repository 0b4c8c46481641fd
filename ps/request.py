# SPDX-License-Identifier: Apache-2.0
"""Requests taken apart: arrays out of messages, checked for shape and against the job's tables.

Invariant: what these functions return agrees with the specs; whether keys belong to their blocks is the table's to check.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from oarlock.client.layout import Layout
from oarlock.client.packed import CHUNK, Form, decode_rows, read_form, read_pull_form, unpack_dense
from oarlock.embedding.refusal import GRADIENT_LIMIT
from oarlock.embedding.table import RATE_LIMIT
from oarlock.proto.arrays import MAX_MESSAGE_BYTES, Part, unpack
from oarlock.proto.common_pb2 import Array
from oarlock.proto.errors import InvalidArgument, Malformed, OutOfMemory, UnknownTable
from oarlock.proto.shard_pb2 import Codec, DenseGradients, PullRequest, PushRequest, TableGradients, TableKeys

# The longest path that Linux takes.
MAX_PATH = 4096
# Above it there is no step + 1 in an int64.
STEP_LIMIT = 1 << 62


@dataclass(frozen=True)
class Keys:
    """Unique keys of one table grouped by block; ``numbers`` are the blocks in the job's layout."""

    table: int
    keys: NDArray[np.uint64]
    blocks: NDArray[np.int32]
    counts: NDArray[np.int32]
    numbers: NDArray[np.int32]

    def only(self, chosen: NDArray[np.bool_]) -> tuple["Keys", NDArray[np.bool_]]:
        """Return the keys of the chosen blocks, and bool[n] of which keys those are."""
        rows = np.repeat(chosen, self.counts)
        return Keys(self.table, self.keys[rows], self.blocks[chosen], self.counts[chosen], self.numbers[chosen]), rows


@dataclass(frozen=True)
class RowPush:
    """Gradients float32[n, dim] for ``keys``, at a learning rate; occurrences uint32[n] and clicks float32[n], or empty."""

    keys: Keys
    gradients: NDArray[np.float32]
    rate: float
    occurrences: NDArray[np.uint32]
    clicks: NDArray[np.float32]

    def only(self, chosen: NDArray[np.bool_]) -> "RowPush":
        """Return what is for the chosen blocks."""
        if chosen.all():
            return self
        keys, rows = self.keys.only(chosen)
        occurrences = self.occurrences[rows] if len(self.occurrences) else self.occurrences
        clicks = self.clicks[rows] if len(self.clicks) else self.clicks
        return RowPush(keys, self.gradients[rows], self.rate, occurrences, clicks)


@dataclass(frozen=True)
class DensePush:
    """Gradients of dense blocks (numbers in the job's layout), one behind the other; each block's begin at its ``starts``."""

    numbers: NDArray[np.int32]
    gradients: NDArray[np.float32]
    starts: NDArray[np.int64]
    rate: float


def read_keys(layout: Layout, message: TableKeys, parts: Sequence[Part] = ()) -> Keys:
    if message.table >= len(layout.tables):
        raise UnknownTable(
            f"the message names table {message.table}, this job has {len(layout.tables)}", table=message.table
        )
    spec = layout.tables[message.table]
    keys = unpack(message.keys, np.uint64, f"keys of {spec.name}", parts=parts)
    blocks = unpack(message.blocks, np.int32, f"blocks of {spec.name}", parts=parts)
    counts = unpack(message.counts, np.int32, f"counts of {spec.name}", parts=parts)
    if len(blocks) != len(counts):
        raise Malformed(f"table {spec.name}: {len(blocks)} blocks but {len(counts)} counts")
    if len(blocks) and not (blocks.min() >= 0 and blocks.max() < spec.blocks):
        raise Malformed(f"table {spec.name}: a block number is outside 0 to {spec.blocks - 1}")
    if len(counts) and counts.min() < 1:
        raise Malformed(f"table {spec.name}: a block has {int(counts.min())} keys; leave blocks without keys out")
    if int(counts.sum(dtype=np.int64)) != len(keys):
        raise Malformed(f"table {spec.name}: counts add up to {int(counts.sum(dtype=np.int64))}, {len(keys)} keys came")
    return Keys(message.table, keys, blocks, counts, layout.table_base[message.table] + blocks)


def read_kept(layout: Layout, message: TableKeys, keys: Keys, parts: Sequence[Part] = ()) -> NDArray[np.uint32] | None:
    """Return which versions the sender of a pull keeps of ``keys``: uint32[n]; None if all rows are to come."""
    if not message.HasField("versions"):
        return None
    spec = layout.tables[keys.table]
    kept = unpack(message.versions, np.uint32, f"versions of {spec.name}", parts=parts)
    if spec.cache is None:
        raise InvalidArgument(f"table {spec.name} keeps no versions of rows: pull without them, or give it a cache")
    if message.bound > spec.cache.bound:
        raise InvalidArgument(f"table {spec.name}: bound = {message.bound} is above cache.bound = {spec.cache.bound}")
    if len(kept) != len(keys.keys):
        raise Malformed(f"table {spec.name}: {len(kept)} versions for {len(keys.keys)} keys")
    return kept


def refuse_parts(layout: Layout, parts: int) -> None:
    """Raise Malformed if a message has more parts than the job has blocks.

    An empty part is two bytes of a message and hundreds in memory, so they are counted before any is looked at.
    """
    if parts > max(layout.blocks, 1):
        raise Malformed(f"{parts} parts in one message, but the job has {layout.blocks} blocks")


_URL = re.compile(r"[a-z][a-z0-9+.-]{0,31}://", re.ASCII)


def read_blocks(layout: Layout, message: Array) -> NDArray[np.int32]:
    """Return numbers of blocks, each once: int32[m]."""
    numbers = unpack(message, np.int32, "blocks").astype(np.int32)
    if len(numbers) and not (numbers.min() >= 0 and numbers.max() < layout.blocks):
        raise Malformed(f"a block's number is outside 0 to {layout.blocks - 1}")
    if len(np.unique(numbers)) != len(numbers):
        raise Malformed("a block is named twice in one message")
    return numbers


def read_generations(layout: Layout, blocks: Array, message: Array) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
    """Return numbers of blocks, and the generation of each one's record: int64[m]."""
    numbers = read_blocks(layout, blocks)
    generations = unpack(message, np.uint64, "generations")
    if len(generations) != len(numbers) or (len(numbers) and int(generations.max()) >= STEP_LIMIT):
        raise Malformed(f"{len(generations)} generations for {len(numbers)} blocks, or one that is no generation")
    return numbers, generations.astype(np.int64)


def read_path(path: str, what: str) -> str:
    if not (path.startswith("/") or _URL.match(path)) or "\0" in path or len(path) > MAX_PATH:
        raise InvalidArgument(
            f"{what} is {path[:80]!r}: give an absolute path, or a URL, of at most {MAX_PATH} characters"
        )
    return path


def read_rate(rate: float, what: str) -> float:
    if not 0 <= rate < RATE_LIMIT:
        raise InvalidArgument(f"{what}: learning rate {rate}: give a number from 0 to below {RATE_LIMIT:g}")
    return rate


def refuse_repeated(numbers: NDArray[np.int32]) -> None:
    """Raise Malformed if a block comes twice in a push: the second part would pass for a repetition and be skipped."""
    ordered = np.sort(numbers)
    repeated = ordered[1:][ordered[1:] == ordered[:-1]]
    if len(repeated):
        block = int(repeated[0])
        raise Malformed(
            f"block {block} comes twice in one push; send all that a group adds to it in one part", block=block
        )


def read_rows(layout: Layout, message: TableGradients, parts: Sequence[Part] = ()) -> RowPush:
    keys = read_keys(layout, message.keys, parts)
    spec = layout.tables[keys.table]
    what = f"gradients of {spec.name}"
    if message.HasField("packed"):
        _refuse_both(message, what)
        # Room for as many values as the message has told of, all of them within the limit of a message.
        form = read_form(message.packed.codec, spec.dim, what, spec.guard.limit)
        if message.packed.values != len(keys.keys) * spec.dim:
            raise Malformed(f"{what}: {message.packed.values} packed values for {len(keys.keys)} keys")
        gradients = np.empty((len(keys.keys), spec.dim), np.float32)
        decode_rows(form, message.packed, gradients, what, parts)
    else:
        gradients = unpack(message.gradients, np.float32, what, dims=2, columns=spec.dim, parts=parts)
    if len(gradients) != len(keys.keys):
        raise Malformed(f"table {spec.name}: {len(gradients)} gradients for {len(keys.keys)} keys")
    occurrences = unpack(message.occurrences, np.uint32, f"occurrences of {spec.name}", parts=parts)
    clicks = unpack(message.clicks, np.float32, f"clicks of {spec.name}", parts=parts)
    for what, beside in (("occurrences", occurrences), ("clicks", clicks)):
        if len(beside) not in (0, len(keys.keys)):
            raise Malformed(f"table {spec.name}: {len(beside)} {what} for {len(keys.keys)} keys")
    if not (np.isfinite(clicks) & (clicks >= 0)).all():
        raise Malformed(f"table {spec.name}: clicks must be finite and >= 0")
    return RowPush(keys, gradients, read_rate(message.rate, f"table {spec.name}"), occurrences, clicks)


def _refuse_both(message: TableGradients | DenseGradients, what: str) -> None:
    if message.HasField("gradients"):
        raise Malformed(f"{what} came twice, as float32 and packed: send one of them")


def refuse_unpacked(request: PushRequest) -> None:
    """Raise OutOfMemory if what came packed is more than a message may hold, once it is unpacked."""
    packed = [part.packed.values for part in (*request.tables, *request.dense) if part.HasField("packed")]
    if sum(packed) * 4 > MAX_MESSAGE_BYTES:
        raise OutOfMemory(
            f"packed gradients of {sum(packed) * 4} bytes are over the limit of {MAX_MESSAGE_BYTES} bytes in one message"
        )


def read_codecs(layout: Layout, request: PullRequest) -> list[Form] | None:
    """Return in which form the rows of each TableKeys are wanted; None: as float32 arrays."""
    if not len(request.codecs):
        return None
    if len(request.codecs) != len(request.tables):
        raise Malformed(f"{len(request.codecs)} codecs for {len(request.tables)} tables: name one for each, or none")
    tables = [layout.tables[keys.table] for keys in request.tables]
    return [read_pull_form(c, t.dim, f"rows of {t.name}") for c, t in zip(request.codecs, tables, strict=True)]


def read_dense_codec(message: Codec) -> Form:
    """Return in which form dense values are wanted."""
    return read_pull_form(message, CHUNK, "dense values")


def read_step(told: int) -> int:
    """Return the step of an update, from 1 on: one more than the groups that were trained before it."""
    if told >= STEP_LIMIT:
        raise InvalidArgument(f"step {told}: a push comes after fewer than {STEP_LIMIT} groups")
    return told + 1


def read_dense_numbers(layout: Layout, message: Array, parts: Sequence[Part] = ()) -> NDArray[np.int32]:
    numbers = unpack(message, np.int32, "dense blocks", parts=parts)
    if len(numbers) and not (layout.dense_base <= numbers.min() and numbers.max() < layout.blocks):
        raise Malformed(f"a dense block's number is outside {layout.dense_base} to {layout.blocks - 1}")
    # Who sends them sorted, as clients do, is believed without another sort.
    if not (numbers[1:] > numbers[:-1]).all() and len(np.unique(numbers)) != len(numbers):
        raise Malformed("a dense block is named twice in one message")
    return numbers


def read_dense(layout: Layout, message: DenseGradients, parts: Sequence[Part] = ()) -> DensePush:
    numbers = read_dense_numbers(layout, message.blocks, parts)
    lengths = layout.lengths_of(numbers)
    if message.HasField("packed"):
        _refuse_both(message, "dense gradients")
        form = read_form(message.packed.codec, CHUNK, "dense gradients", GRADIENT_LIMIT)
        values = unpack_dense(form, message.packed, lengths.tolist(), "dense gradients", parts)
    else:
        values = unpack(message.gradients, np.float32, "dense gradients", parts=parts)
    ends = np.cumsum(lengths)
    if lengths.sum() != len(values):
        raise Malformed(f"{len(values)} dense gradients came for blocks of {int(lengths.sum())} values")
    return DensePush(numbers, values, ends - lengths, read_rate(message.rate, "dense parameters"))
