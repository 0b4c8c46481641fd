# SPDX-License-Identifier: Apache-2.0
"""In which forms the values of a job travel, by table and direction. A pure function of its spec; any thread."""

from collections.abc import Mapping

from oarlock.client.compression import DENSE, WireSpec
from oarlock.client.layout import Layout
from oarlock.client.packed import CHUNK, form_of
from oarlock.embedding.refusal import GRADIENT_LIMIT


class Forms:
    """The forms of a job's tables, in their order, and of its dense parameters; ``kept``: which have error feedback."""

    def __init__(self, layout: Layout, compression: Mapping[str, WireSpec], seed: int) -> None:
        self.layout = layout
        self.seed = seed
        plain = WireSpec()
        wires = [compression.get(table.name, plain) for table in layout.tables]
        dense = compression.get(DENSE, plain)
        self.pulls = [form_of(w.pulled, t.dim, zstd=w.zstd) for w, t in zip(wires, layout.tables, strict=True)]
        self.pushes = [
            form_of(w.pushed, t.dim, zstd=w.zstd, limit=t.guard.limit, pushed=True)
            for w, t in zip(wires, layout.tables, strict=True)
        ]
        self.pull_dense = form_of(dense.pulled, CHUNK, zstd=dense.zstd)
        self.push_dense = form_of(dense.pushed, CHUNK, zstd=dense.zstd, limit=GRADIENT_LIMIT, pushed=True)
        self.kept = [w.pushed.feedback for w in wires]
        self.kept_dense = dense.pushed.feedback
        self.feedback = any(self.kept) or self.kept_dense
