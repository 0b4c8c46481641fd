# SPDX-License-Identifier: Apache-2.0
"""The coordinator's durable state, in one SQLite file (WAL, synchronous = FULL).

Invariant: what the coordinator tells was committed here before; one process holds the file, by an exclusive lock for life.
Called under the coordinator's lock, from any thread.
"""

import json
import sqlite3
from pathlib import Path
from types import TracebackType
from typing import Any

from oarlock.proto.errors import InvalidArgument, Unavailable

SCHEMA = """
CREATE TABLE IF NOT EXISTS facts (name TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS members (incarnation INTEGER PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS evaluations (split INTEGER PRIMARY KEY, sums TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS epochs (epoch INTEGER PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS placements (generation INTEGER PRIMARY KEY, owners BLOB NOT NULL, shards TEXT NOT NULL);
"""


class Store:
    """Facts by name, members, evaluation sums, epoch results and placements. Use as ``with store: ...`` for one transaction."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._db: sqlite3.Connection | None = None

    def open(self) -> "Store":
        """Open or create the file and lock it; Unavailable if another coordinator has it."""
        db = sqlite3.connect(self._path, timeout=0.2, isolation_level=None, check_same_thread=False)
        try:
            # The lock is taken by the first write and kept until the connection ends.
            db.execute("PRAGMA locking_mode = EXCLUSIVE")
            db.execute("PRAGMA journal_mode = WAL")
            db.execute("PRAGMA synchronous = FULL")
            db.execute("BEGIN IMMEDIATE")
            for statement in SCHEMA.strip().split(";\n"):
                db.execute(statement)
            db.execute("INSERT OR REPLACE INTO facts VALUES ('opened', '1')")
            db.execute("COMMIT")
        except sqlite3.OperationalError as error:
            db.close()
            raise Unavailable(
                f"{self._path} cannot be locked: another coordinator of this job is running ({error})"
            ) from error
        except sqlite3.DatabaseError as error:
            db.close()
            raise InvalidArgument(f"{self._path} is no coordinator state: {error}") from error
        self._db = db
        return self

    @property
    def _open(self) -> sqlite3.Connection:
        if self._db is None:
            raise Unavailable("the coordinator's state is closed")
        return self._db

    def close(self) -> None:
        if self._db is not None:
            self._db.close()
            self._db = None

    def __enter__(self) -> "Store":
        self._open.execute("BEGIN IMMEDIATE")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open.execute("ROLLBACK" if kind else "COMMIT")

    def fact(self, name: str, default: Any = None) -> Any:
        found = self._open.execute("SELECT value FROM facts WHERE name = ?", (name,)).fetchone()
        return default if found is None else json.loads(found[0])

    def set_fact(self, name: str, value: Any) -> None:
        self._open.execute("INSERT OR REPLACE INTO facts VALUES (?, ?)", (name, json.dumps(value)))

    def members(self) -> list[dict[str, Any]]:
        return [json.loads(v) for (v,) in self._open.execute("SELECT value FROM members ORDER BY incarnation")]

    def set_member(self, incarnation: int, value: dict[str, Any]) -> None:
        self._open.execute("INSERT OR REPLACE INTO members VALUES (?, ?)", (incarnation, json.dumps(value)))

    def evaluations(self) -> dict[int, list[float]]:
        return {s: json.loads(v) for s, v in self._open.execute("SELECT split, sums FROM evaluations")}

    def set_evaluation(self, split: int, sums: list[float]) -> None:
        self._open.execute("INSERT OR REPLACE INTO evaluations VALUES (?, ?)", (split, json.dumps(sums)))

    def clear_evaluations(self) -> None:
        self._open.execute("DELETE FROM evaluations")

    def epochs(self) -> list[dict[str, Any]]:
        return [json.loads(v) for (v,) in self._open.execute("SELECT value FROM epochs ORDER BY epoch")]

    def set_epoch(self, epoch: int, value: dict[str, Any]) -> None:
        self._open.execute("INSERT OR REPLACE INTO epochs VALUES (?, ?)", (epoch, json.dumps(value)))

    def clear_epochs(self) -> None:
        self._open.execute("DELETE FROM epochs")

    def placement(self) -> tuple[int, bytes, list[dict[str, Any]]] | None:
        """Return (generation, int32 owners as bytes, shards) of the newest placement."""
        found = self._open.execute("SELECT * FROM placements ORDER BY generation DESC LIMIT 1").fetchone()
        return None if found is None else (found[0], found[1], json.loads(found[2]))

    def set_placement(self, generation: int, owners: bytes, shards: list[dict[str, Any]]) -> None:
        self._open.execute("INSERT INTO placements VALUES (?, ?, ?)", (generation, owners, json.dumps(shards)))
