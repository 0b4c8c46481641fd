# SPDX-License-Identifier: Apache-2.0
"""The coordinator's durable state, in one SQLite file (WAL, synchronous = FULL).

Invariant: what the coordinator tells was committed here before; one process holds the file, by an exclusive lock for life.
After a failed write (a full disk) it answers nothing any more: what its owner remembers may be ahead of it. Called under
the coordinator's lock, from any thread.
"""

import contextlib
import json
import sqlite3
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Any

from oarlock.cluster.evaluation import Found
from oarlock.proto.errors import InvalidArgument, Unavailable

SCHEMA = """
CREATE TABLE IF NOT EXISTS facts (name TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS members (incarnation INTEGER PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS evaluations (split INTEGER PRIMARY KEY, sums TEXT NOT NULL, scores BLOB);
CREATE TABLE IF NOT EXISTS epochs (epoch INTEGER PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS placements (generation INTEGER PRIMARY KEY, owners BLOB NOT NULL, shards TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS records (block INTEGER PRIMARY KEY, generation INTEGER, owner INTEGER, members BLOB);
"""
# Columns that a file of an earlier release lacks.
ADDED = (
    ("evaluations", "scores"),
    ("placements", "generations"),
    ("placements", "members"),
)
# A coordinator that was killed a moment ago may still hold the lock.
LOCK_SECONDS = 1.0
_TAKEN = (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED)


class Store:
    """Facts by name, members, findings of evaluations, epoch results, the placement. ``with store: ...`` is one transaction."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._db: sqlite3.Connection | None = None
        self._broken = ""

    def open(self) -> "Store":
        """Open or create the file and lock it; Unavailable if another coordinator has it."""
        try:
            db = sqlite3.connect(self._path, timeout=LOCK_SECONDS, isolation_level=None, check_same_thread=False)
        except sqlite3.Error as error:
            raise InvalidArgument(f"{self._path} cannot be opened: {error}") from None
        try:
            # The lock is taken by the first write and kept until the connection ends.
            db.execute("PRAGMA locking_mode = EXCLUSIVE")
            db.execute("PRAGMA journal_mode = WAL")
            db.execute("PRAGMA synchronous = FULL")
            db.execute("BEGIN IMMEDIATE")
            for statement in SCHEMA.strip().split(";\n"):
                db.execute(statement)
            for table, column in ADDED:
                if column not in [known[1] for known in db.execute(f"PRAGMA table_info({table})")]:
                    db.execute(f"ALTER TABLE {table} ADD COLUMN {column} BLOB")
            db.execute("INSERT OR REPLACE INTO facts VALUES ('opened', '1')")
            db.execute("COMMIT")
        except sqlite3.Error as error:
            db.close()
            if error.sqlite_errorcode in _TAKEN:
                raise Unavailable(f"{self._path} is locked: another coordinator of this job is running") from None
            raise InvalidArgument(
                f"{self._path} is no coordinator state, or cannot be written: {error}; "
                "move it away to go on from the job's newest checkpoint with --resume"
            ) from None
        self._db = db
        return self

    def _execute(self, statement: str, values: tuple[Any, ...] = ()) -> list[Any]:
        if self._broken:
            raise Unavailable(self._broken)
        if self._db is None:
            raise Unavailable("the coordinator's state is closed")
        try:
            return self._db.execute(statement, values).fetchall()
        except sqlite3.Error as error:
            self._broken = (
                f"{self._path} cannot be written or read any more: {error}; mend that and go on with --resume"
            )
            with contextlib.suppress(sqlite3.Error):
                self._db.execute("ROLLBACK")
            raise Unavailable(self._broken) from error

    def check(self) -> None:
        """Raise Unavailable if a write has failed."""
        if self._broken:
            raise Unavailable(self._broken)

    def close(self) -> None:
        if self._db is not None:
            self._db.close()
            self._db = None

    def hand_on(self) -> "Store":
        """Return the same file for another owner; whoever had it until now can neither read nor write it any more."""
        after = Store(self._path)
        after._db, self._db = self._db, None
        return after

    def __enter__(self) -> "Store":
        self._execute("BEGIN IMMEDIATE")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self._execute("COMMIT")
        elif not self._broken:
            self._execute("ROLLBACK")

    def fact(self, name: str, default: Any = None) -> Any:
        found = self._execute("SELECT value FROM facts WHERE name = ?", (name,))
        return json.loads(found[0][0]) if found else default

    def set_fact(self, name: str, value: Any) -> None:
        self._execute("INSERT OR REPLACE INTO facts VALUES (?, ?)", (name, json.dumps(value)))

    def members(self) -> list[dict[str, Any]]:
        return [json.loads(v) for (v,) in self._execute("SELECT value FROM members ORDER BY incarnation")]

    def set_member(self, incarnation: int, value: dict[str, Any]) -> None:
        self._execute("INSERT OR REPLACE INTO members VALUES (?, ?)", (incarnation, json.dumps(value)))

    def delete_member(self, incarnation: int) -> None:
        self._execute("DELETE FROM members WHERE incarnation = ?", (incarnation,))

    def evaluations(self) -> dict[int, Found]:
        found = self._execute("SELECT split, sums, scores FROM evaluations")
        return {s: json.loads(sums) if scores is None else scores for s, sums, scores in found}

    def set_evaluation(self, split: int, found: Found) -> None:
        sums, scores = ("[]", found) if isinstance(found, bytes) else (json.dumps(found), None)
        self._execute("INSERT OR REPLACE INTO evaluations VALUES (?, ?, ?)", (split, sums, scores))

    def clear_evaluations(self) -> None:
        self._execute("DELETE FROM evaluations")

    def epochs(self) -> list[dict[str, Any]]:
        return [json.loads(v) for (v,) in self._execute("SELECT value FROM epochs ORDER BY epoch")]

    def set_epoch(self, epoch: int, value: dict[str, Any]) -> None:
        self._execute("INSERT OR REPLACE INTO epochs VALUES (?, ?)", (epoch, json.dumps(value)))

    def clear_epochs(self) -> None:
        self._execute("DELETE FROM epochs")

    def placement(self) -> tuple[int, bytes, list[dict[str, Any]]] | None:
        """Return (generation, int32 owners as bytes, shards) of the newest placement."""
        found = self._execute("SELECT generation, owners, shards FROM placements ORDER BY generation DESC LIMIT 1")
        return (found[0][0], found[0][1], json.loads(found[0][2])) if found else None

    def placement_sets(self) -> tuple[bytes | None, bytes | None]:
        """Return (int64 generations, int32 members) of the newest placement as bytes; None in files of before there were any."""
        found = self._execute("SELECT generations, members FROM placements ORDER BY generation DESC LIMIT 1")
        return (found[0][0], found[0][1]) if found else (None, None)

    def set_placement(self, generation: int, owners: bytes, shards: list[dict[str, Any]]) -> None:
        """Take a placement in the place of the one before and of all records beside it."""
        self._execute("DELETE FROM placements")
        self._execute("DELETE FROM records")
        self._execute(
            "INSERT INTO placements (generation, owners, shards) VALUES (?, ?, ?)",
            (generation, owners, json.dumps(shards)),
        )

    def set_placement_sets(self, generations: bytes, members: bytes) -> None:
        self._execute("UPDATE placements SET generations = ?, members = ?", (generations, members))

    def set_shards(self, shards: list[dict[str, Any]]) -> None:
        self._execute("UPDATE placements SET shards = ?", (json.dumps(shards),))

    def records(self) -> list[tuple[int, int, int, bytes]]:
        """Return (block, generation, owner, int32 members as bytes) of records that are newer than the placement."""
        return self._execute("SELECT block, generation, owner, members FROM records")

    def set_records(self, rows: Iterable[tuple[int, int, int, bytes]]) -> None:
        for row in rows:
            self._execute("INSERT OR REPLACE INTO records VALUES (?, ?, ?, ?)", row)
