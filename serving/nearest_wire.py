# SPDX-License-Identifier: Apache-2.0
"""Nearest rows as messages: the question that a client makes, the answer that a server gives, and what the client reads of it.

Invariant: a question that is wrong anywhere is refused before anything is compared, and one that would take much memory before
that is taken. Pure, but for the server's search. Any thread.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from oarlock.proto.arrays import MAX_MESSAGE_BYTES, pack, unpack
from oarlock.proto.errors import InvalidArgument, Malformed, OutOfMemory
from oarlock.proto.methods import PROTOCOL
from oarlock.proto.serving_pb2 import ModelVersion, NearestReply, NearestRequest
from oarlock.proto.work import expects
from oarlock.serving.recall import Asked
from oarlock.serving.snapshot import Model
from oarlock.serving.vectors import BLOCK_ROWS

# Of one request: vectors, and keys for each; keys of a filter are limited as those of a look-up.
MAX_VECTORS, MAX_NEAREST = 256, 16_384


class Neighbours(NamedTuple):
    """For each vector, best first: keys: uint64[q, k] and scores: float32[q, k], of which ``counts``: int64[q] are there.

    ``version``: (run, cut, seconds since) of the rows that were compared.
    """

    keys: NDArray[np.uint64]
    scores: NDArray[np.float32]
    counts: NDArray[np.int64]
    version: tuple[int, int, float]


def nearest_request(
    table: str,
    vectors: Any,
    k: int,
    *,
    exact: bool,
    among: NDArray[np.uint64] | None,
    without: NDArray[np.uint64] | None,
    job: str = "",
) -> tuple[NearestRequest, tuple[int, ...]]:
    """Return the request, and the shape of what is asked."""
    try:
        asked = np.ascontiguousarray(vectors, np.float32)
    except (TypeError, ValueError):
        asked = np.empty(0, np.float32)
    if asked.ndim == 1 and asked.size:
        asked = asked[None]
    if asked.ndim != 2:
        raise InvalidArgument(f"vectors for table {table}: give float32[q, dim], or one vector")
    if isinstance(k, bool) or not isinstance(k, int | np.integer) or not 1 <= k <= MAX_NEAREST:
        raise InvalidArgument(f"k = {k!r}: give an integer from 1 to {MAX_NEAREST}")
    request = NearestRequest(protocol=PROTOCOL, table=table, vectors=pack(asked), k=int(k), exact=exact, job=job)
    if among is not None:
        request.among.CopyFrom(pack(among))
    if without is not None:
        request.without.CopyFrom(pack(without))
    return request, (len(asked), int(k))


def answer_nearest(recall: Asked, model: Model, request: NearestRequest, max_keys: int) -> NearestReply:
    """Return the answer to a request, by the indexes of ``model``."""
    k = request.k
    if not 1 <= k <= MAX_NEAREST:
        raise InvalidArgument(f"k = {k}: give an integer from 1 to {MAX_NEAREST}")
    index = recall.index(request.table)
    vectors = unpack(request.vectors, np.float32, "vectors", dims=2)
    if not 1 <= len(vectors) <= MAX_VECTORS:
        raise InvalidArgument(f"a request has {len(vectors)} vectors; give 1 to {MAX_VECTORS}: ask in parts")
    among, without = (unpack(keys, np.uint64, "keys of a filter") for keys in (request.among, request.without))
    if len(among) + len(without) > max_keys:
        raise InvalidArgument(f"filters of {len(among) + len(without)} keys; the limit is {max_keys}")
    model.part.check(model.table(request.table).spec, among)
    size = 12 * len(vectors) * k
    if size > MAX_MESSAGE_BYTES:
        raise OutOfMemory(f"{len(vectors)} times {k} keys and scores take {size} bytes: ask for them in parts")
    # What is compared at once, its scores, and for how many of them it is sorted out where they are.
    compared = min(index.rows, BLOCK_ROWS)
    # A live model's candidates are looked up, some more of them than are asked for.
    rows = min(max(len(among), 2 * len(vectors) * k), BLOCK_ROWS)
    expects(size + len(vectors) * (compared * 12 + 24 * k) + 8 * index.dim * rows)
    found, version = recall.nearest(
        request.table,
        vectors,
        k,
        exact=request.exact,
        among=among if request.HasField("among") else None,
        without=without,
    )
    told = ModelVersion(run=version.run, cut=version.cut, seconds_since=version.age(), live=version.live)
    return NearestReply(version=told, keys=pack(found.keys), scores=pack(found.scores), counts=found.counts.tolist())


def read_nearest(reply: NearestReply, shape: Sequence[int]) -> Neighbours:
    """Return what an answer says; Malformed if it is not one to a question of that shape."""
    keys = unpack(reply.keys, np.uint64, "nearest keys", dims=2)
    scores = unpack(reply.scores, np.float32, "their scores", dims=2)
    counts = np.array(reply.counts, np.int64)
    if (
        keys.shape != tuple(shape)
        or scores.shape != keys.shape
        or counts.shape != keys.shape[:1]
        or (counts > shape[1]).any()
    ):
        raise Malformed(f"nearest keys of {list(keys.shape)} came for {list(shape)}")
    version = reply.version
    return Neighbours(keys.copy(), scores.copy(), counts, (version.run, version.cut, version.seconds_since))
