# SPDX-License-Identifier: Apache-2.0
"""The models of a serving process as the Open Inference Protocol has them: predictions of the recipe, and rows of each table.

    RECIPE     inputs: the raw columns of the recipe's data, [rows]; output: score FP32[rows]
    TABLE      input: keys UINT64[n]; output: rows FP32[n, dim]

Invariant: an answer is of one snapshot, or one run of a job that is followed, whose RUN.CUT is the model's version; another
version is NotFound. A request that is
wrong anywhere is refused whole, before memory is taken for it. What form messages have is others' business (inference.py).
Any thread.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import pyarrow as pa

from oarlock import __version__
from oarlock.data.columns import ColumnSpec, decode
from oarlock.proto.errors import InvalidArgument, Malformed, NotFound, Unavailable
from oarlock.serving.predictor import Predictor
from oarlock.serving.remote import RemoteModel
from oarlock.serving.service import ServingService
from oarlock.serving.snapshot import Model, Version
from oarlock.serving.tensors import INTEGERS, Tensor, arrow_of

SERVER = "oarlock"
EXTENSIONS = ("binary_tensor_data",)
PLATFORM = "oarlock"
KEYS, ROWS, SCORE = "keys", "rows", "score"
# Inputs of one request, and characters of what it calls itself, whatever form it has.
MAX_INPUTS = 4096
MAX_ID = 1024
_KEY = (ColumnSpec(KEYS, "key"),)


class Described(NamedTuple):
    """A tensor in a model's metadata: name, datatype, shape (-1: any)."""

    name: str
    datatype: str
    shape: tuple[int, ...]


class Metadata(NamedTuple):
    """What a model takes and gives."""

    name: str
    version: str
    inputs: tuple[Described, ...]
    outputs: tuple[Described, ...]


class Answer(NamedTuple):
    """What came of a request: the version it is of, how many keys had no row (None: not known), and the outputs."""

    name: str
    version: Version
    missing: int | None
    outputs: tuple[Tensor, ...]

    @property
    def parameters(self) -> dict[str, int | float]:
        """Return the version in parts, its age, and how many keys had no row, if that is known."""
        version = self.version
        told = {"run": version.run, "cut": version.cut, "seconds_since": version.age()}
        return told if self.missing is None else {**told, "missing": self.missing}


def text_of(version: Version) -> str:
    """Return a version as the protocol has it."""
    return f"{version.run}.{version.cut}"


class Models:
    """The models of what ``service`` serves, from ``begin`` on. ``predictor``: None where there are rows alone."""

    def __init__(self, service: ServingService) -> None:
        self._service = service
        self.predictor: Predictor | None = None
        self._begun = False

    def begin(self, predictor: Predictor | None) -> None:
        """Take a predictor, once it is warm; a snapshot is served."""
        if predictor is not None:
            current = self._service.serving.current
            # By what is here: servers of rows may serve another version by now, and owe nobody an answer yet.
            predictor.warm_up(current.base if isinstance(current, RemoteModel) else current)
        self.predictor = predictor
        self._begun = True

    @property
    def ready(self) -> bool:
        return self._begun and self._service.serving.ready

    def _current(self) -> Model:
        if not self._begun:
            raise Unavailable("this process is still opening its model: ask again")
        return self._service.serving.current

    @property
    def server_version(self) -> str:
        return __version__

    def names(self) -> list[str]:
        """Return the names of all models: none where there is a part of a model alone."""
        snapshot = self._current()
        if not snapshot.part.whole:
            return []
        return [*([self._prediction(snapshot)] if self.predictor else []), *snapshot.tables]

    def _prediction(self, snapshot: Model) -> str:
        """Return the name of the model that predicts: its recipe's, unless a table has that."""
        assert self.predictor is not None
        name = self.predictor.name
        return f"{name}.prediction" if name in snapshot.tables else name

    def _found(self, name: str, version: str) -> tuple[Model, Predictor | None]:
        """Return the snapshot, and the predictor if ``name`` is its model's; NotFound says what there is."""
        snapshot = self._current()
        if not snapshot.part.whole:
            raise NotFound(
                f"there are no models here: this process has {snapshot.part} of one, and answers oarlock.Serving alone"
            )
        predicts = self.predictor is not None and name == self._prediction(snapshot)
        if not predicts and name not in snapshot.tables:
            raise NotFound(f"there is no model {name[:200]!r}; the models are {', '.join(self.names())}"[:1000])
        if version not in ("", served := text_of(snapshot.version)):
            raise NotFound(
                f"model {name} has no version {version[:40]!r} here; {served} is served: ask for that, or for none",
                version=served,
            )
        return snapshot, self.predictor if predicts else None

    def is_ready(self, name: str, version: str) -> bool:
        """Tell whether a model can be asked; NotFound if there is none."""
        self._found(name, version)
        return True

    def metadata(self, name: str, version: str) -> Metadata:
        """Say what a model takes and gives."""
        snapshot, predictor = self._found(name, version)
        served = text_of(snapshot.version)
        if predictor is None:
            dim = snapshot.tables[name].spec.dim
            return Metadata(name, served, (Described(KEYS, "UINT64", (-1,)),), (Described(ROWS, "FP32", (-1, dim)),))
        inputs = (Described(each, datatype, (-1,)) for each, datatype in predictor.columns.told().items())
        return Metadata(name, served, tuple(inputs), (Described(SCORE, "FP32", (-1,)),))

    def infer(self, name: str, version: str, inputs: Sequence[Tensor], outputs: Sequence[str]) -> Answer:
        """Answer a request; ``outputs``: which are asked for, none: all there are."""
        snapshot, predictor = self._found(name, version)
        given = {tensor.name: tensor for tensor in inputs}
        if len(given) != len(inputs):
            raise Malformed("two inputs have the same name")
        there = ROWS if predictor is None else SCORE
        if unknown := [each for each in outputs if each != there]:
            raise InvalidArgument(f"model {name} has no output {unknown[0][:200]!r}; it has {there!r}")
        if len(outputs) > 1:
            raise Malformed(f"output {there!r} is asked for {len(outputs)} times")
        # What it is of at least, where rows change meanwhile.
        of = snapshot.version
        missing: int | None
        if predictor is None:
            output, missing = self._rows(snapshot, name, given)
        else:
            arrays, rows = predictor.columns.read(given)
            scores, missing = predictor.predict(snapshot, arrays, rows)
            output = Tensor(SCORE, "FP32", (rows,), scores)
        return Answer(name, of, missing, (output,))

    def _rows(self, snapshot: Model, name: str, given: Mapping[str, Tensor]) -> tuple[Tensor, int]:
        if set(given) != {KEYS}:
            raise InvalidArgument(
                f"model {name} has one input, {KEYS!r}; given were {', '.join(given) or 'none'}"[:1000]
            )
        tensor = given[KEYS]
        if tensor.datatype not in INTEGERS or len(tensor.shape) != 1:
            raise InvalidArgument(
                f"input {KEYS!r}: give UINT64 of shape [n], not {tensor.datatype}{list(tensor.shape)}"
            )
        table, n = snapshot.tables[name], tensor.shape[0]
        self._service.check_keys(n, 4 * n * table.spec.dim, snapshot.copies)
        keys: Any = decode("request", 0, pa.table({KEYS: arrow_of(tensor)}), _KEY)[KEYS]
        rows, missing = self._service.rows_of(snapshot, name, keys)
        return Tensor(ROWS, "FP32", rows.shape, rows), missing
