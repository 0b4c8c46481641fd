from oarlock.proto import common_pb2 as _common_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class ModelVersion(_message.Message):
    __slots__ = ("run", "cut", "seconds_since", "live")
    RUN_FIELD_NUMBER: _ClassVar[int]
    CUT_FIELD_NUMBER: _ClassVar[int]
    SECONDS_SINCE_FIELD_NUMBER: _ClassVar[int]
    LIVE_FIELD_NUMBER: _ClassVar[int]
    run: int
    cut: int
    seconds_since: float
    live: bool
    def __init__(self, run: _Optional[int] = ..., cut: _Optional[int] = ..., seconds_since: _Optional[float] = ..., live: bool = ...) -> None: ...

class TableLookup(_message.Message):
    __slots__ = ("table", "keys")
    TABLE_FIELD_NUMBER: _ClassVar[int]
    KEYS_FIELD_NUMBER: _ClassVar[int]
    table: str
    keys: _common_pb2.Array
    def __init__(self, table: _Optional[str] = ..., keys: _Optional[_Union[_common_pb2.Array, _Mapping]] = ...) -> None: ...

class LookupRequest(_message.Message):
    __slots__ = ("protocol", "tables", "version", "job")
    PROTOCOL_FIELD_NUMBER: _ClassVar[int]
    TABLES_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    JOB_FIELD_NUMBER: _ClassVar[int]
    protocol: int
    tables: _containers.RepeatedCompositeFieldContainer[TableLookup]
    version: ModelVersion
    job: str
    def __init__(self, protocol: _Optional[int] = ..., tables: _Optional[_Iterable[_Union[TableLookup, _Mapping]]] = ..., version: _Optional[_Union[ModelVersion, _Mapping]] = ..., job: _Optional[str] = ...) -> None: ...

class TableFound(_message.Message):
    __slots__ = ("rows", "missing")
    ROWS_FIELD_NUMBER: _ClassVar[int]
    MISSING_FIELD_NUMBER: _ClassVar[int]
    rows: _common_pb2.Array
    missing: int
    def __init__(self, rows: _Optional[_Union[_common_pb2.Array, _Mapping]] = ..., missing: _Optional[int] = ...) -> None: ...

class LookupReply(_message.Message):
    __slots__ = ("version", "tables", "failure")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    TABLES_FIELD_NUMBER: _ClassVar[int]
    FAILURE_FIELD_NUMBER: _ClassVar[int]
    version: ModelVersion
    tables: _containers.RepeatedCompositeFieldContainer[TableFound]
    failure: _common_pb2.Failure
    def __init__(self, version: _Optional[_Union[ModelVersion, _Mapping]] = ..., tables: _Optional[_Iterable[_Union[TableFound, _Mapping]]] = ..., failure: _Optional[_Union[_common_pb2.Failure, _Mapping]] = ...) -> None: ...

class ModelRequest(_message.Message):
    __slots__ = ("protocol",)
    PROTOCOL_FIELD_NUMBER: _ClassVar[int]
    protocol: int
    def __init__(self, protocol: _Optional[int] = ...) -> None: ...

class ServedTable(_message.Message):
    __slots__ = ("name", "dim", "rows", "dtype", "bytes", "absent", "blocks", "salt")
    NAME_FIELD_NUMBER: _ClassVar[int]
    DIM_FIELD_NUMBER: _ClassVar[int]
    ROWS_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    BYTES_FIELD_NUMBER: _ClassVar[int]
    ABSENT_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    SALT_FIELD_NUMBER: _ClassVar[int]
    name: str
    dim: int
    rows: int
    dtype: str
    bytes: int
    absent: str
    blocks: int
    salt: int
    def __init__(self, name: _Optional[str] = ..., dim: _Optional[int] = ..., rows: _Optional[int] = ..., dtype: _Optional[str] = ..., bytes: _Optional[int] = ..., absent: _Optional[str] = ..., blocks: _Optional[int] = ..., salt: _Optional[int] = ...) -> None: ...

class ModelReply(_message.Message):
    __slots__ = ("job", "version", "tables", "pinned", "cuts", "problem", "part", "parts")
    JOB_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    TABLES_FIELD_NUMBER: _ClassVar[int]
    PINNED_FIELD_NUMBER: _ClassVar[int]
    CUTS_FIELD_NUMBER: _ClassVar[int]
    PROBLEM_FIELD_NUMBER: _ClassVar[int]
    PART_FIELD_NUMBER: _ClassVar[int]
    PARTS_FIELD_NUMBER: _ClassVar[int]
    job: str
    version: ModelVersion
    tables: _containers.RepeatedCompositeFieldContainer[ServedTable]
    pinned: bool
    cuts: _containers.RepeatedScalarFieldContainer[int]
    problem: str
    part: int
    parts: int
    def __init__(self, job: _Optional[str] = ..., version: _Optional[_Union[ModelVersion, _Mapping]] = ..., tables: _Optional[_Iterable[_Union[ServedTable, _Mapping]]] = ..., pinned: bool = ..., cuts: _Optional[_Iterable[int]] = ..., problem: _Optional[str] = ..., part: _Optional[int] = ..., parts: _Optional[int] = ...) -> None: ...

class ServeCutRequest(_message.Message):
    __slots__ = ("protocol", "cut", "newest")
    PROTOCOL_FIELD_NUMBER: _ClassVar[int]
    CUT_FIELD_NUMBER: _ClassVar[int]
    NEWEST_FIELD_NUMBER: _ClassVar[int]
    protocol: int
    cut: int
    newest: bool
    def __init__(self, protocol: _Optional[int] = ..., cut: _Optional[int] = ..., newest: bool = ...) -> None: ...

class NearestRequest(_message.Message):
    __slots__ = ("protocol", "table", "vectors", "k", "exact", "among", "without", "version", "job")
    PROTOCOL_FIELD_NUMBER: _ClassVar[int]
    TABLE_FIELD_NUMBER: _ClassVar[int]
    VECTORS_FIELD_NUMBER: _ClassVar[int]
    K_FIELD_NUMBER: _ClassVar[int]
    EXACT_FIELD_NUMBER: _ClassVar[int]
    AMONG_FIELD_NUMBER: _ClassVar[int]
    WITHOUT_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    JOB_FIELD_NUMBER: _ClassVar[int]
    protocol: int
    table: str
    vectors: _common_pb2.Array
    k: int
    exact: bool
    among: _common_pb2.Array
    without: _common_pb2.Array
    version: ModelVersion
    job: str
    def __init__(self, protocol: _Optional[int] = ..., table: _Optional[str] = ..., vectors: _Optional[_Union[_common_pb2.Array, _Mapping]] = ..., k: _Optional[int] = ..., exact: bool = ..., among: _Optional[_Union[_common_pb2.Array, _Mapping]] = ..., without: _Optional[_Union[_common_pb2.Array, _Mapping]] = ..., version: _Optional[_Union[ModelVersion, _Mapping]] = ..., job: _Optional[str] = ...) -> None: ...

class NearestReply(_message.Message):
    __slots__ = ("version", "keys", "scores", "counts", "failure")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    KEYS_FIELD_NUMBER: _ClassVar[int]
    SCORES_FIELD_NUMBER: _ClassVar[int]
    COUNTS_FIELD_NUMBER: _ClassVar[int]
    FAILURE_FIELD_NUMBER: _ClassVar[int]
    version: ModelVersion
    keys: _common_pb2.Array
    scores: _common_pb2.Array
    counts: _containers.RepeatedScalarFieldContainer[int]
    failure: _common_pb2.Failure
    def __init__(self, version: _Optional[_Union[ModelVersion, _Mapping]] = ..., keys: _Optional[_Union[_common_pb2.Array, _Mapping]] = ..., scores: _Optional[_Union[_common_pb2.Array, _Mapping]] = ..., counts: _Optional[_Iterable[int]] = ..., failure: _Optional[_Union[_common_pb2.Failure, _Mapping]] = ...) -> None: ...
