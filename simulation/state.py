# SPDX-License-Identifier: Apache-2.0
"""The coordinator's store as the simulation sees it: what is committed, and a death in the middle of a transaction.

Invariant: ``committed`` holds what a reader of the file would find, and survives the process that wrote it. One thread.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from oarlock.cluster.evaluation import Found
from oarlock.cluster.store import Store
from oarlock.simulation.wire import Killed


class Record(NamedTuple):
    """A block's: its generation, its owner (-1: none), and all members."""

    generation: int
    owner: int
    members: tuple[int, ...]


@dataclass
class Committed:
    """What is on disk: facts by name, members, evaluations and epochs by number, records of blocks."""

    facts: dict[str, Any] = field(default_factory=dict)
    members: dict[int, Any] = field(default_factory=dict)
    evaluations: dict[int, Found] = field(default_factory=dict)
    # Owners by block and generation of its record.
    records: dict[tuple[int, int], int] = field(default_factory=dict)
    epochs: dict[int, Any] = field(default_factory=dict)
    # By block its record; and which records took the place of which others, until somebody has looked at them.
    sets: dict[int, Record] = field(default_factory=dict)
    changes: list[tuple[int, Record | None, Record]] = field(default_factory=list)


class WatchedStore(Store):
    """A Store that notes what it commits. ``tear``: so many statements from now its process dies, which ``died`` is told."""

    def __init__(self, path: Path, committed: Committed, died: Callable[[], None]) -> None:
        super().__init__(path)
        self._died = died
        self._committed = committed
        self._pending: list[tuple[dict[Any, Any], Any, Any]] = []
        self._clear = self._clear_epochs = False
        self.tear: int | None = None
        self._dead = False

    def _execute(self, statement: str, values: tuple[Any, ...] = ()) -> list[Any]:
        if self._dead:
            return []
        strikes = False
        if self.tear is not None:
            self.tear -= 1
            strikes = self.tear < 0
        # Before it, unless it is the COMMIT: then all is on disk, and nobody was told.
        if strikes and statement != "COMMIT":
            self._die()
        found = super()._execute(statement, values)
        if statement == "COMMIT":
            self._note()
        if strikes:
            self._die()
        return found

    def _die(self) -> None:
        self._dead = True
        self._died()
        raise Killed

    def _note(self) -> None:
        if self._clear:
            self._committed.evaluations.clear()
        if self._clear_epochs:
            self._committed.epochs.clear()
        for where, key, value in self._pending:
            if where is self._committed.sets:
                self._committed.changes.append((key, where.get(key), value))
            where[key] = value
        self._forget()

    def _forget(self) -> None:
        self._pending, self._clear, self._clear_epochs = [], False, False

    def __enter__(self) -> "WatchedStore":
        self._forget()
        super().__enter__()
        return self

    def set_fact(self, name: str, value: Any) -> None:
        super().set_fact(name, value)
        self._pending.append((self._committed.facts, name, value))

    def set_member(self, incarnation: int, value: dict[str, Any]) -> None:
        super().set_member(incarnation, value)
        self._pending.append((self._committed.members, incarnation, value))

    def set_evaluation(self, split: int, found: Found) -> None:
        super().set_evaluation(split, found)
        self._pending.append((self._committed.evaluations, split, found))

    def clear_evaluations(self) -> None:
        super().clear_evaluations()
        self._clear = True

    def clear_epochs(self) -> None:
        super().clear_epochs()
        self._clear_epochs = True

    def set_placement(self, generation: int, owners: bytes, shards: list[dict[str, Any]]) -> None:
        super().set_placement(generation, owners, shards)
        self._owners = np.frombuffer(owners, np.int32)

    def set_placement_sets(self, generations: bytes, members: bytes) -> None:
        super().set_placement_sets(generations, members)
        found = np.frombuffer(members, np.int32).reshape(len(self._owners), -1)
        for block, generation in enumerate(np.frombuffer(generations, np.int64).tolist()):
            self._recorded(block, generation, int(self._owners[block]), found[block])

    def set_records(self, rows: Iterable[tuple[int, int, int, bytes]]) -> None:
        made = list(rows)
        super().set_records(made)
        for block, generation, owner, packed in made:
            self._recorded(block, generation, owner, np.frombuffer(packed, np.int32))

    def _recorded(self, block: int, generation: int, owner: int, members: NDArray[np.int32]) -> None:
        self._pending.append((self._committed.records, (block, generation), owner))
        record = Record(generation, owner, tuple(m for m in members.tolist() if m >= 0))
        if self._committed.sets.get(block) != record:
            self._pending.append((self._committed.sets, block, record))

    def set_epoch(self, epoch: int, value: dict[str, Any]) -> None:
        super().set_epoch(epoch, value)
        self._pending.append((self._committed.epochs, epoch, value))
