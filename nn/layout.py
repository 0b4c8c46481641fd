# SPDX-License-Identifier: Apache-2.0
"""Where each node's values and gradient lie, decided once when a graph is bound.

A strip is a run of columns of a buffer. What only moves columns costs nothing where it can: ``columns`` is a strip of
its input, inputs of ``concat`` are computed in place in its buffer, and of a lookup what ``field_columns`` reads is
gathered by itself (straight into a concat, if it feeds one), and so are ``columns`` if nobody reads the whole.
Invariant: two live values never share a column, and a Linear's input and output never share a buffer, since numpy would
then copy one for BLAS. Built by ``nn.program``; strips belong to the one thread that runs the program.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np

from oarlock.nn.graph import FieldRange, Lookup, Node, Range, consumers, topological, trainable

Array = np.ndarray[Any, Any]

ALIGNMENT = 64


def aligned(rows: int, width: int) -> Array:
    """Return zeros float32[rows, width] that begin at a cache line, wherever memory was free."""
    raw = np.zeros(rows * width * 4 + ALIGNMENT, np.uint8)
    begin = -raw.ctypes.data % ALIGNMENT
    return raw[begin : begin + rows * width * 4].view(np.float32).reshape(rows, width)


class Strip:
    """The columns start..start+width of a buffer. ``rows``: its first ``batch`` rows; ``matrix``: only the columns."""

    __slots__ = ("buffer", "matrix", "rows", "start", "width")

    def __init__(self, buffer: Array, start: int, width: int) -> None:
        self.buffer = buffer
        self.start = start
        self.width = width
        self.resize(len(buffer))

    def resize(self, batch: int) -> None:
        self.rows = self.buffer[:batch]
        self.matrix = self.rows[:, self.start : self.start + self.width]

    def part(self, start: int, width: int) -> "Strip":
        return Strip(self.buffer, self.start + start, width)

    def same(self, other: "Strip") -> bool:
        return self.buffer is other.buffer and (self.start, self.width) == (other.start, other.width)


@dataclass(frozen=True)
class Piece:
    """The columns start..stop of every field of a lookup (``each``) or of its fields side by side: ``node``'s value."""

    node: Node
    start: int
    stop: int
    each: bool


@dataclass(frozen=True)
class Route:
    """Gradient that an operation left in ``source`` and that still has to go to ``target``."""

    source: Strip
    target: Strip
    accumulate: bool


@dataclass
class Layout:
    """The plan: values of all nodes, gradients of those on the way to the loss, and how gradients meet.

    ``pieces``: what of a lookup is gathered by itself. ``moves``: inputs of a concat that lie elsewhere, and where to.
    ``targets``: where a node's backward writes each input's gradient, None if it need not. ``routes``: what is done
    with gradients right after it. ``zeros``: cleared before any backward.
    """

    values: dict[Node, Strip] = field(default_factory=dict)
    gradients: dict[Node, Strip] = field(default_factory=dict)
    pieces: dict[Node, list[Piece]] = field(default_factory=dict)
    moves: dict[Node, list[tuple[Strip, Strip]]] = field(default_factory=dict)
    targets: dict[Node, list[Strip | None]] = field(default_factory=dict)
    routes: dict[Node, list[Route]] = field(default_factory=dict)
    zeros: list[Strip] = field(default_factory=list)

    def strips(self) -> Iterable[Strip]:
        """Return every strip, for a change of batch."""
        found: dict[int, Strip] = {}
        groups: Sequence[Iterable[Strip | None]] = (
            self.values.values(),
            self.gradients.values(),
            (strip for row in self.targets.values() for strip in row),
            (strip for row in self.routes.values() for route in row for strip in (route.source, route.target)),
            (strip for row in self.moves.values() for pair in row for strip in pair),
            self.zeros,
        )
        for group in groups:
            found.update((id(strip), strip) for strip in group if strip is not None)
        return found.values()


class _Planner:
    """Fills a Layout; lives for one call of ``plan``."""

    def __init__(self, loss: Node, score: Node, max_batch: int) -> None:
        self.max_batch = max_batch
        self.score = score
        self.order = topological(loss, score)
        self.readers = consumers(self.order)
        self.loss_order = topological(loss)
        self.loss_readers = consumers(self.loss_order)
        self.learning = trainable(self.loss_order)
        self.layout = Layout()
        self.placed: dict[Node, tuple[Node, int]] = {}
        self.piece_of: set[Node] = set()
        self.scratch: dict[int, Array] = {}

    # Values.

    def split_lookups(self) -> None:
        for node in self.order:
            if node.operation != "lookup":
                continue
            readers = [reader for reader, _ in reversed(self.readers[node])]
            rest = [reader for reader in readers if reader.operation != "field_columns"]
            whole = node is self.score or any(reader.operation != "columns" for reader in rest)
            apart = [reader for reader in readers if not (whole and reader in rest)]
            pieces = [node, *apart] if whole else apart
            self.layout.pieces[node] = [_piece(node, reader) for reader in pieces]
            self.piece_of.update(apart)
            if node in self.loss_readers:
                # Their gradients go to the rows, not to the lookup's.
                self.loss_readers[node] = [one for one in self.loss_readers[node] if one[0] not in self.piece_of]

    def is_alias(self, node: Node) -> bool:
        return node.operation == "columns" and node not in self.piece_of

    def root(self, node: Node) -> Node:
        """Return the node that owns the buffer in which ``node`` lies."""
        while True:
            if self.is_alias(node):
                node = node.inputs[0]
            elif node in self.placed:
                node = self.placed[node][0]
            else:
                return node

    def readers_through_aliases(self, node: Node) -> list[Node]:
        out: list[Node] = []
        for reader, _ in self.readers[node]:
            out += self.readers_through_aliases(reader) if self.is_alias(reader) else [reader]
        return out

    def may_place(self, node: Node, target: Node) -> bool:
        if self.is_alias(node) or node in self.placed or (node.operation == "lookup" and node not in self._own(node)):
            return False
        buffer = self.root(target)
        if node.operation == "linear" and self.root(node.inputs[0]) is buffer:
            return False
        below = self.readers_through_aliases(node)
        return not any(reader.operation == "linear" and self.root(reader) is buffer for reader in below)

    def _own(self, lookup: Node) -> list[Node]:
        return [piece.node for piece in self.layout.pieces[lookup]]

    def place_values(self) -> None:
        for node in reversed(self.order):
            if node.operation != "concat":
                continue
            offset = 0
            for child in node.inputs:
                if self.may_place(child, node):
                    self.placed[child] = (node, offset)
                offset += child.width
        for node in self.order:
            if not (node in self.layout.pieces and node not in self._own(node)):
                self.value(node)
        for node in self.order:
            if node.operation == "concat":
                own = self.value(node)
                slices = [own.part(_offset(node, position), child.width) for position, child in enumerate(node.inputs)]
                pairs = zip(map(self.value, node.inputs), slices, strict=True)
                self.layout.moves[node] = [(source, target) for source, target in pairs if not source.same(target)]

    def value(self, node: Node) -> Strip:
        if node not in self.layout.values:
            if self.is_alias(node):
                strip = self.value(node.inputs[0]).part(_start(node), node.width)
            elif node in self.placed:
                target, offset = self.placed[node]
                strip = self.value(target).part(offset, node.width)
            else:
                strip = Strip(aligned(self.max_batch, node.width), 0, node.width)
            self.layout.values[node] = strip
        return self.layout.values[node]

    # Gradients.

    def sliced(self, node: Node) -> bool:
        """Whether every reader takes columns of its own, so that their gradients can lie side by side in the node's."""
        readers = [reader for reader, _ in self.loss_readers[node]]
        if not all(self.is_alias(reader) for reader in readers):
            return False
        ranges = sorted((_start(reader), _start(reader) + reader.width) for reader in readers)
        return all(stop <= start for (_, stop), (start, _) in pairwise(ranges))

    def gradient(self, node: Node) -> Strip:
        if node not in self.layout.gradients:
            readers = self.loss_readers[node]
            reader, position = readers[0]
            if self.is_alias(node) and self.sliced(node.inputs[0]):
                strip = self.gradient(node.inputs[0]).part(_start(node), node.width)
            elif len(readers) == 1 and reader.operation == "concat":
                strip = self.gradient(reader).part(_offset(reader, position), node.width)
            else:
                strip = Strip(aligned(self.max_batch, node.width), 0, node.width)
            self.layout.gradients[node] = strip
        return self.layout.gradients[node]

    def temporary(self, index: int, width: int) -> Strip:
        """Return scratch: it is read by the routes of the same node, before any other node writes it."""
        if index not in self.scratch:
            widest = max(node.width for node in self.learning)
            self.scratch[index] = aligned(self.max_batch, widest)
        return Strip(self.scratch[index], 0, width)

    def plan_gradients(self) -> None:
        for node in self.loss_order:
            self.layout.targets[node] = [None] * len(node.inputs)
            self.layout.routes[node] = []
        for node in reversed(self.loss_order):
            if node in self.learning and self.loss_readers[node] and node in self.layout.values:
                self._meet(node, self.gradient(node))

    def _meet(self, node: Node, own: Strip) -> None:
        if self.sliced(node):
            if sum(reader.width for reader, _ in self.loss_readers[node]) < node.width:
                self.layout.zeros.append(own)
            return
        first = True
        for reader, position in self.loss_readers[node]:
            source: Strip | None = None
            if reader.operation == "concat":
                source = self.gradient(reader).part(_offset(reader, position), node.width)
            elif reader.operation == "add":
                source = self.gradient(reader)
            elif reader.operation == "columns":
                source = self.gradient(reader)
                if first:
                    self.layout.zeros.append(own)
                self.layout.routes[reader].append(Route(source, own.part(_start(reader), reader.width), True))
                first = False
                continue
            if source is None:
                source = own if first else self.temporary(position, node.width)
                self.layout.targets[reader][position] = source
            if not source.same(own):
                self.layout.routes[reader].append(Route(source, own, not first))
            first = False


def _piece(lookup: Node, reader: Node) -> Piece:
    assert isinstance(lookup.detail, Lookup)
    dim = lookup.detail.dim
    match reader.detail:
        case FieldRange(start, stop):
            return Piece(reader, start, stop, True)
        case Range(start, stop):
            return Piece(reader, start, stop, lookup.detail.fields == 1)
    return Piece(reader, 0, dim, True)


def _start(node: Node) -> int:
    assert isinstance(node.detail, Range)
    return node.detail.start


def _offset(concat: Node, position: int) -> int:
    return sum(child.width for child in concat.inputs[:position])


def plan(loss: Node, score: Node, max_batch: int) -> Layout:
    """Return where everything lies for batches of up to ``max_batch``; allocates the buffers."""
    planner = _Planner(loss, score, max_batch)
    planner.split_lookups()
    planner.place_values()
    planner.plan_gradients()
    return planner.layout
