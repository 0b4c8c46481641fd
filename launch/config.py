# SPDX-License-Identifier: Apache-2.0
"""The configuration of a run: defaults, then a TOML file, then the command line's --set and options.

Invariant: an unknown field is an error that suggests the near one; the resolved form, written back as TOML, gives the same run.
"""

import dataclasses
import difflib
import math
import re
import tomllib
import types
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from oarlock.checkpoint.place import place_of
from oarlock.client.autoscale import check_autoscale, read_autoscale
from oarlock.client.compression import read_compression
from oarlock.client.job import MAX_THREADS, MODES, ROLLBACK, check_copies, check_ranks
from oarlock.client.processors import NETWORK_THREADS, NETWORK_THREADS_RANGE, parse_cores
from oarlock.client.security import settled
from oarlock.client.warm import read_warm_start
from oarlock.launch.every import read_every
from oarlock.proto.errors import InvalidArgument, NotFound
from oarlock.proto.security import SecuritySpec
from oarlock.proto.work import REQUEST_MEMORY_BYTES, REQUEST_MEMORY_RANGE
from oarlock.worker.recipe import Recipe

READERS = ("petastorm", "arrow", "auto")
# Cores are shared out among the processes of this machine.
AUTO = "auto"
_BARE_KEY = re.compile(r"[A-Za-z0-9_-]+")


@dataclass(frozen=True)
class RunConfig:
    """One run of `oarlock train`. The recipe's own fields stand in ``recipe_options`` (TOML table ``[recipe_options]``).

    ``ranks``: of modes sync and hybrid; 0: as many as there are workers.
    ``restore``: the checkpoint with which the job begins, of whose training it is the continuation.
    ``checkpoint_path``: where checkpoints go, a folder or a URL like ``s3://bucket/folder`` (empty: the job's folder), with the
    options of its file system (TOML table ``[checkpoint_options]``). Credentials are none of them: see ``checkpoint/place.py``.
    ``compression``: how values travel, by table (``[compression.TABLE]``), of the dense parameters as ``[compression.dense]``.
    ``warm_start``: fields of a WarmStart (``[warm_start]``), for a new job whose rows begin with those of a checkpoint.
    ``autoscale``: fields of an Autoscale (``[autoscale]``), by which servers and workers come and go while the job trains.
    ``security``: fields of a SecuritySpec (``[security]``): paths of secrets, never secrets.
    ``cache``: fields of a CacheSpec by table (TOML tables ``[cache.NAME]``), for rows that workers keep.
    """

    recipe: str = "ncf"
    data: str = ""
    # behaviour
    epochs: int = 20
    seed: int = 0
    mode: str = "async"
    staleness: int = 0
    ranks: int = 0
    accumulate: int = 1
    reader: str = "auto"
    checkpoint_epochs: int = 1
    checkpoint_every: str = ""
    checkpoints_kept: int = 2
    checkpoint_keep_best: int = 0
    checkpoint_path: str = ""
    checkpoint_compress: str = ""
    replicas: int = 0
    on_loss: str = ROLLBACK
    # performance
    servers: int = 2
    workers: int = 2
    open_splits: int = 2
    prefetch: int = 1
    compute_threads: int = 1
    blas_threads: int = 1
    network_threads: int = NETWORK_THREADS
    request_memory_bytes: int = REQUEST_MEMORY_BYTES
    server_pin_cores: str = ""
    worker_pin_cores: str = ""
    lease_seconds: float = 5.0
    heartbeat_seconds: float = 0.5
    gate_seconds: float = 2.0
    restarts: int = 1000
    moves_in_flight: int = 16
    rebalance_seconds: float = 30.0
    autoscale: dict[str, Any] = field(default_factory=dict)
    restore: str = ""
    checkpoint_options: dict[str, Any] = field(default_factory=dict)
    compression: dict[str, Any] = field(default_factory=dict)
    cache: dict[str, Any] = field(default_factory=dict)
    warm_start: dict[str, Any] = field(default_factory=dict)
    security: dict[str, Any] = field(default_factory=dict)
    recipe_options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.reader not in READERS:
            raise InvalidArgument(f"reader = {self.reader!r}: choose one of {', '.join(READERS)}")
        for name, least, most in (
            ("servers", 1, 4096),
            ("workers", 1, 4096),
            ("epochs", 1, 1 << 20),
            ("open_splits", 1, 64),
            ("prefetch", 1, 64),
            ("accumulate", 1, 4096),
            ("compute_threads", 1, MAX_THREADS),
            ("blas_threads", 1, MAX_THREADS),
            ("network_threads", *NETWORK_THREADS_RANGE),
            ("request_memory_bytes", *REQUEST_MEMORY_RANGE),
        ):
            if not least <= getattr(self, name) <= most:
                raise InvalidArgument(f"{name} = {getattr(self, name)}: give an integer from {least} to {most}")
        for name in ("server_pin_cores", "worker_pin_cores"):
            # Whether this machine has them is asked when the job is run, perhaps on another one.
            if getattr(self, name) not in ("", AUTO):
                parse_cores(getattr(self, name), name)
        if not 0 <= self.seed < 1 << 63:
            raise InvalidArgument(f"seed = {self.seed}: give an integer from 0 to 2^63 - 1")
        if self.mode not in MODES:
            raise InvalidArgument(f"mode = {self.mode!r}: choose one of {', '.join(MODES)}")
        if not 0 <= self.staleness <= 1 << 20:
            raise InvalidArgument(f"staleness = {self.staleness}: give an integer from 0 to {1 << 20}")
        if self.staleness and self.mode != "ssp":
            raise InvalidArgument(
                f"staleness = {self.staleness} and mode = {self.mode!r} contradict each other: only ssp bounds it; "
                "give mode = 'ssp', or staleness = 0"
            )
        check_ranks(self.mode, self.ranks, self.prefetch)
        check_copies(
            self.mode,
            self.replicas,
            self.on_loss,
            self.moves_in_flight,
            self.servers,
            rebalance_seconds=self.rebalance_seconds,
        )
        if not 0 <= self.restarts <= 1 << 20:
            raise InvalidArgument(
                f"restarts = {self.restarts}: give an integer from 0 (killed processes are not started again) to {1 << 20}"
            )
        if self.checkpoint_epochs < 0 or self.checkpoints_kept < 1:
            raise InvalidArgument("checkpoint_epochs must be >= 0 and checkpoints_kept >= 1")
        if not 0 <= self.checkpoint_keep_best <= 1 << 20:
            raise InvalidArgument(
                f"checkpoint_keep_best = {self.checkpoint_keep_best}: give an integer from 0 to {1 << 20}"
            )
        place_of(self)
        read_every(self.checkpoint_every)
        if not 0 < self.gate_seconds <= 3600:
            raise InvalidArgument(f"gate_seconds = {self.gate_seconds}: give a number above 0, at most 3600")
        if not 0 < self.heartbeat_seconds < self.lease_seconds:
            raise InvalidArgument(
                f"heartbeat_seconds = {self.heartbeat_seconds} must be above 0 and below lease_seconds = {self.lease_seconds}"
            )
        # Which tables there are only the recipe knows; see JobSpec.
        read_compression(self.compression, "job file")
        read_warm_start(self.warm_start, "job file")
        check_autoscale(read_autoscale(self.autoscale, "job file"), self.replicas)
        object.__setattr__(self, "security", settled(self.security))
        self.security_spec()

    def security_spec(self) -> SecuritySpec:
        """Return what the processes of the job go by towards others."""
        built: SecuritySpec = build(SecuritySpec, self.security, "job file: security")
        return built


def load_toml(path: Path) -> dict[str, Any]:
    """Return a TOML file's values; the errors name the file."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise NotFound(f"{path}: no such file") from None
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise InvalidArgument(f"{path}: {error}") from None


def assign(values: dict[str, Any], setting: str) -> None:
    """Apply one ``--set a.b=c`` to nested values. ``c`` is read as TOML, or taken as a string if it is none."""
    name, equals, text = setting.partition("=")
    parts = name.strip().split(".")
    text = text.strip()
    if not equals or not all(parts):
        raise InvalidArgument(f"--set {setting}: write it as NAME=VALUE or TABLE.NAME=VALUE")
    try:
        read = tomllib.loads(f"value = {text}")
        value = read["value"] if len(read) == 1 else text
    except tomllib.TOMLDecodeError:
        value = text
    for part in parts[:-1]:
        values = values.setdefault(part, {})
        if not isinstance(values, dict):
            raise InvalidArgument(f"--set {setting}: {part} is a value, not a table")
    values[parts[-1]] = value


def build(kind: type, values: Mapping[str, Any], owner: str) -> Any:
    """Return ``kind(**values)`` with every field's name and type checked; ``owner`` begins the messages."""
    known = {f.name: f for f in dataclasses.fields(kind)}
    hints = get_type_hints(kind)
    for name, value in values.items():
        if name not in known:
            near = difflib.get_close_matches(name, known, 1, 0.5)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise InvalidArgument(f"{owner}: unknown field {name!r}{hint} Known: {', '.join(known)}")
        if not _is(hints[name], value):
            raise InvalidArgument(f"{owner}: {name} = {value!r}: give {_named(hints[name])}")
        if isinstance(value, str) and "\0" in value:
            raise InvalidArgument(f"{owner}: {name} holds a zero byte")
    return kind(**{n: float(v) if hints[n] is float else v for n, v in values.items()})


def _is(hint: Any, value: Any) -> bool:
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if get_origin(hint) is tuple:
        return isinstance(value, list | tuple) and all(_is(get_args(hint)[0], v) for v in value)
    if get_origin(hint) is dict:
        return isinstance(value, dict)
    if isinstance(hint, types.UnionType):
        return any(_is(h, value) for h in get_args(hint))
    return isinstance(value, hint)


def _named(hint: Any) -> str:
    if get_origin(hint) is tuple:
        return f"a list, each {_named(get_args(hint)[0])}"
    return {int: "an integer", float: "a finite number", str: "a string", bool: "true or false"}.get(hint, "a table")


def run_config(values: Mapping[str, Any]) -> RunConfig:
    """Return the checked configuration of a run."""
    built: RunConfig = build(RunConfig, values, "job file")
    return built


def recipe_config(recipe: Recipe, options: Mapping[str, Any]) -> Any:
    """Return the recipe's Config made of a run's recipe_options."""
    return build(recipe.Config, options, "recipe_options")


def to_toml(run: RunConfig, options: Mapping[str, Any]) -> str:
    """Return the resolved run as TOML: ``options`` are the recipe's fields after it saw the data."""
    lines = []
    for f in dataclasses.fields(run):
        if f.name not in ("recipe_options", "compression"):
            lines.append(f"{f.name} = {_toml(getattr(run, f.name))}")
    for table, settings in run.compression.items():
        lines += ["", f"[compression.{_key(table)}]", *(f"{_key(k)} = {_toml(v)}" for k, v in settings.items())]
    # TOML has no null: what is left open stays away.
    lines += ["", "[recipe_options]", *(f"{_key(k)} = {_toml(v)}" for k, v in options.items() if v is not None)]
    return "\n".join(lines) + "\n"


def _key(name: str) -> str:
    return name if _BARE_KEY.fullmatch(name) else _toml(name)


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_toml(v) for v in value) + "]"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_key(k)} = {_toml(v)}" for k, v in value.items() if v is not None) + "}"
    text = str(value)
    try:
        text.encode()
    except UnicodeEncodeError:
        raise InvalidArgument(f"{text!r} is no text in UTF-8, as a job file must be") from None
    text = text.replace("\\", "\\\\").replace('"', '\\"')
    return '"' + "".join(c if c.isprintable() else f"\\U{ord(c):08x}" for c in text) + '"'
