from oarlock.proto import common_pb2 as _common_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class RowsVerb(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    ROWS_UNSPECIFIED: _ClassVar[RowsVerb]
    GET: _ClassVar[RowsVerb]
    EXPLAIN: _ClassVar[RowsVerb]
    EXPORT: _ClassVar[RowsVerb]
    UNDO: _ClassVar[RowsVerb]
    QUARANTINE: _ClassVar[RowsVerb]
ROWS_UNSPECIFIED: RowsVerb
GET: RowsVerb
EXPLAIN: RowsVerb
EXPORT: RowsVerb
UNDO: RowsVerb
QUARANTINE: RowsVerb

class TableKeys(_message.Message):
    __slots__ = ("table", "keys", "blocks", "counts", "versions", "bound")
    TABLE_FIELD_NUMBER: _ClassVar[int]
    KEYS_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    COUNTS_FIELD_NUMBER: _ClassVar[int]
    VERSIONS_FIELD_NUMBER: _ClassVar[int]
    BOUND_FIELD_NUMBER: _ClassVar[int]
    table: int
    keys: _common_pb2.Array
    blocks: _common_pb2.Array
    counts: _common_pb2.Array
    versions: _common_pb2.Array
    bound: int
    def __init__(self, table: _Optional[int] = ..., keys: _Optional[_Union[_common_pb2.Array, _Mapping]] = ..., blocks: _Optional[_Union[_common_pb2.Array, _Mapping]] = ..., counts: _Optional[_Union[_common_pb2.Array, _Mapping]] = ..., versions: _Optional[_Union[_common_pb2.Array, _Mapping]] = ..., bound: _Optional[int] = ...) -> None: ...

class Codec(_message.Message):
    __slots__ = ("codec", "k", "zstd")
    CODEC_FIELD_NUMBER: _ClassVar[int]
    K_FIELD_NUMBER: _ClassVar[int]
    ZSTD_FIELD_NUMBER: _ClassVar[int]
    codec: int
    k: int
    zstd: bool
    def __init__(self, codec: _Optional[int] = ..., k: _Optional[int] = ..., zstd: bool = ...) -> None: ...

class Packed(_message.Message):
    __slots__ = ("codec", "payload", "values")
    CODEC_FIELD_NUMBER: _ClassVar[int]
    PAYLOAD_FIELD_NUMBER: _ClassVar[int]
    VALUES_FIELD_NUMBER: _ClassVar[int]
    codec: Codec
    payload: _common_pb2.Array
    values: int
    def __init__(self, codec: _Optional[_Union[Codec, _Mapping]] = ..., payload: _Optional[_Union[_common_pb2.Array, _Mapping]] = ..., values: _Optional[int] = ...) -> None: ...

class PullRequest(_message.Message):
    __slots__ = ("header", "tables", "dense", "number", "codecs", "dense_codec", "rank", "state", "samples")
    HEADER_FIELD_NUMBER: _ClassVar[int]
    TABLES_FIELD_NUMBER: _ClassVar[int]
    DENSE_FIELD_NUMBER: _ClassVar[int]
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    CODECS_FIELD_NUMBER: _ClassVar[int]
    DENSE_CODEC_FIELD_NUMBER: _ClassVar[int]
    RANK_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    SAMPLES_FIELD_NUMBER: _ClassVar[int]
    header: _common_pb2.Header
    tables: _containers.RepeatedCompositeFieldContainer[TableKeys]
    dense: _common_pb2.Array
    number: int
    codecs: _containers.RepeatedCompositeFieldContainer[Codec]
    dense_codec: Codec
    rank: int
    state: int
    samples: int
    def __init__(self, header: _Optional[_Union[_common_pb2.Header, _Mapping]] = ..., tables: _Optional[_Iterable[_Union[TableKeys, _Mapping]]] = ..., dense: _Optional[_Union[_common_pb2.Array, _Mapping]] = ..., number: _Optional[int] = ..., codecs: _Optional[_Iterable[_Union[Codec, _Mapping]]] = ..., dense_codec: _Optional[_Union[Codec, _Mapping]] = ..., rank: _Optional[int] = ..., state: _Optional[int] = ..., samples: _Optional[int] = ...) -> None: ...

class PullReply(_message.Message):
    __slots__ = ("rows", "dense", "pushes", "packed", "packed_dense", "positions", "versions", "failure", "waits", "lowest", "highest", "generation")
    ROWS_FIELD_NUMBER: _ClassVar[int]
    DENSE_FIELD_NUMBER: _ClassVar[int]
    PUSHES_FIELD_NUMBER: _ClassVar[int]
    PACKED_FIELD_NUMBER: _ClassVar[int]
    PACKED_DENSE_FIELD_NUMBER: _ClassVar[int]
    POSITIONS_FIELD_NUMBER: _ClassVar[int]
    VERSIONS_FIELD_NUMBER: _ClassVar[int]
    FAILURE_FIELD_NUMBER: _ClassVar[int]
    WAITS_FIELD_NUMBER: _ClassVar[int]
    LOWEST_FIELD_NUMBER: _ClassVar[int]
    HIGHEST_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    rows: _containers.RepeatedCompositeFieldContainer[_common_pb2.Array]
    dense: _common_pb2.Array
    pushes: int
    packed: _containers.RepeatedCompositeFieldContainer[Packed]
    packed_dense: Packed
    positions: _containers.RepeatedCompositeFieldContainer[_common_pb2.Array]
    versions: _containers.RepeatedCompositeFieldContainer[_common_pb2.Array]
    failure: _common_pb2.Failure
    waits: bool
    lowest: int
    highest: int
    generation: int
    def __init__(self, rows: _Optional[_Iterable[_Union[_common_pb2.Array, _Mapping]]] = ..., dense: _Optional[_Union[_common_pb2.Array, _Mapping]] = ..., pushes: _Optional[int] = ..., packed: _Optional[_Iterable[_Union[Packed, _Mapping]]] = ..., packed_dense: _Optional[_Union[Packed, _Mapping]] = ..., positions: _Optional[_Iterable[_Union[_common_pb2.Array, _Mapping]]] = ..., versions: _Optional[_Iterable[_Union[_common_pb2.Array, _Mapping]]] = ..., failure: _Optional[_Union[_common_pb2.Failure, _Mapping]] = ..., waits: bool = ..., lowest: _Optional[int] = ..., highest: _Optional[int] = ..., generation: _Optional[int] = ...) -> None: ...

class TableGradients(_message.Message):
    __slots__ = ("keys", "gradients", "rate", "occurrences", "clicks", "packed")
    KEYS_FIELD_NUMBER: _ClassVar[int]
    GRADIENTS_FIELD_NUMBER: _ClassVar[int]
    RATE_FIELD_NUMBER: _ClassVar[int]
    OCCURRENCES_FIELD_NUMBER: _ClassVar[int]
    CLICKS_FIELD_NUMBER: _ClassVar[int]
    PACKED_FIELD_NUMBER: _ClassVar[int]
    keys: TableKeys
    gradients: _common_pb2.Array
    rate: float
    occurrences: _common_pb2.Array
    clicks: _common_pb2.Array
    packed: Packed
    def __init__(self, keys: _Optional[_Union[TableKeys, _Mapping]] = ..., gradients: _Optional[_Union[_common_pb2.Array, _Mapping]] = ..., rate: _Optional[float] = ..., occurrences: _Optional[_Union[_common_pb2.Array, _Mapping]] = ..., clicks: _Optional[_Union[_common_pb2.Array, _Mapping]] = ..., packed: _Optional[_Union[Packed, _Mapping]] = ...) -> None: ...

class DenseGradients(_message.Message):
    __slots__ = ("blocks", "gradients", "rate", "packed")
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    GRADIENTS_FIELD_NUMBER: _ClassVar[int]
    RATE_FIELD_NUMBER: _ClassVar[int]
    PACKED_FIELD_NUMBER: _ClassVar[int]
    blocks: _common_pb2.Array
    gradients: _common_pb2.Array
    rate: float
    packed: Packed
    def __init__(self, blocks: _Optional[_Union[_common_pb2.Array, _Mapping]] = ..., gradients: _Optional[_Union[_common_pb2.Array, _Mapping]] = ..., rate: _Optional[float] = ..., packed: _Optional[_Union[Packed, _Mapping]] = ...) -> None: ...

class PushRequest(_message.Message):
    __slots__ = ("header", "split", "group", "tables", "dense", "step", "number", "seen", "rank")
    HEADER_FIELD_NUMBER: _ClassVar[int]
    SPLIT_FIELD_NUMBER: _ClassVar[int]
    GROUP_FIELD_NUMBER: _ClassVar[int]
    TABLES_FIELD_NUMBER: _ClassVar[int]
    DENSE_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    SEEN_FIELD_NUMBER: _ClassVar[int]
    RANK_FIELD_NUMBER: _ClassVar[int]
    header: _common_pb2.Header
    split: int
    group: int
    tables: _containers.RepeatedCompositeFieldContainer[TableGradients]
    dense: _containers.RepeatedCompositeFieldContainer[DenseGradients]
    step: int
    number: int
    seen: int
    rank: int
    def __init__(self, header: _Optional[_Union[_common_pb2.Header, _Mapping]] = ..., split: _Optional[int] = ..., group: _Optional[int] = ..., tables: _Optional[_Iterable[_Union[TableGradients, _Mapping]]] = ..., dense: _Optional[_Iterable[_Union[DenseGradients, _Mapping]]] = ..., step: _Optional[int] = ..., number: _Optional[int] = ..., seen: _Optional[int] = ..., rank: _Optional[int] = ...) -> None: ...

class PushReply(_message.Message):
    __slots__ = ("applied", "skipped", "moved", "where", "refused", "failure")
    APPLIED_FIELD_NUMBER: _ClassVar[int]
    SKIPPED_FIELD_NUMBER: _ClassVar[int]
    MOVED_FIELD_NUMBER: _ClassVar[int]
    WHERE_FIELD_NUMBER: _ClassVar[int]
    REFUSED_FIELD_NUMBER: _ClassVar[int]
    FAILURE_FIELD_NUMBER: _ClassVar[int]
    applied: int
    skipped: int
    moved: _common_pb2.Array
    where: _common_pb2.Placement
    refused: int
    failure: _common_pb2.Failure
    def __init__(self, applied: _Optional[int] = ..., skipped: _Optional[int] = ..., moved: _Optional[_Union[_common_pb2.Array, _Mapping]] = ..., where: _Optional[_Union[_common_pb2.Placement, _Mapping]] = ..., refused: _Optional[int] = ..., failure: _Optional[_Union[_common_pb2.Failure, _Mapping]] = ...) -> None: ...

class MarksRequest(_message.Message):
    __slots__ = ("header", "splits")
    HEADER_FIELD_NUMBER: _ClassVar[int]
    SPLITS_FIELD_NUMBER: _ClassVar[int]
    header: _common_pb2.Header
    splits: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, header: _Optional[_Union[_common_pb2.Header, _Mapping]] = ..., splits: _Optional[_Iterable[int]] = ...) -> None: ...

class MarksReply(_message.Message):
    __slots__ = ("next",)
    NEXT_FIELD_NUMBER: _ClassVar[int]
    next: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, next: _Optional[_Iterable[int]] = ...) -> None: ...

class RankCommits(_message.Message):
    __slots__ = ("steps", "samples")
    STEPS_FIELD_NUMBER: _ClassVar[int]
    SAMPLES_FIELD_NUMBER: _ClassVar[int]
    steps: _common_pb2.Array
    samples: _common_pb2.Array
    def __init__(self, steps: _Optional[_Union[_common_pb2.Array, _Mapping]] = ..., samples: _Optional[_Union[_common_pb2.Array, _Mapping]] = ...) -> None: ...

class RanksRequest(_message.Message):
    __slots__ = ("header", "hold")
    HEADER_FIELD_NUMBER: _ClassVar[int]
    HOLD_FIELD_NUMBER: _ClassVar[int]
    header: _common_pb2.Header
    hold: int
    def __init__(self, header: _Optional[_Union[_common_pb2.Header, _Mapping]] = ..., hold: _Optional[int] = ...) -> None: ...

class RanksReply(_message.Message):
    __slots__ = ("commits", "lowest", "highest")
    COMMITS_FIELD_NUMBER: _ClassVar[int]
    LOWEST_FIELD_NUMBER: _ClassVar[int]
    HIGHEST_FIELD_NUMBER: _ClassVar[int]
    commits: RankCommits
    lowest: int
    highest: int
    def __init__(self, commits: _Optional[_Union[RankCommits, _Mapping]] = ..., lowest: _Optional[int] = ..., highest: _Optional[int] = ...) -> None: ...

class AdoptRequest(_message.Message):
    __slots__ = ("header", "placement", "closed", "restore", "create")
    HEADER_FIELD_NUMBER: _ClassVar[int]
    PLACEMENT_FIELD_NUMBER: _ClassVar[int]
    CLOSED_FIELD_NUMBER: _ClassVar[int]
    RESTORE_FIELD_NUMBER: _ClassVar[int]
    CREATE_FIELD_NUMBER: _ClassVar[int]
    header: _common_pb2.Header
    placement: _common_pb2.Placement
    closed: _common_pb2.ClosedSplits
    restore: str
    create: _common_pb2.Array
    def __init__(self, header: _Optional[_Union[_common_pb2.Header, _Mapping]] = ..., placement: _Optional[_Union[_common_pb2.Placement, _Mapping]] = ..., closed: _Optional[_Union[_common_pb2.ClosedSplits, _Mapping]] = ..., restore: _Optional[str] = ..., create: _Optional[_Union[_common_pb2.Array, _Mapping]] = ...) -> None: ...

class AdoptReply(_message.Message):
    __slots__ = ("generation", "rows")
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    ROWS_FIELD_NUMBER: _ClassVar[int]
    generation: int
    rows: int
    def __init__(self, generation: _Optional[int] = ..., rows: _Optional[int] = ...) -> None: ...

class CloseRequest(_message.Message):
    __slots__ = ("header", "closed")
    HEADER_FIELD_NUMBER: _ClassVar[int]
    CLOSED_FIELD_NUMBER: _ClassVar[int]
    header: _common_pb2.Header
    closed: _common_pb2.ClosedSplits
    def __init__(self, header: _Optional[_Union[_common_pb2.Header, _Mapping]] = ..., closed: _Optional[_Union[_common_pb2.ClosedSplits, _Mapping]] = ...) -> None: ...

class CutRequest(_message.Message):
    __slots__ = ("header", "cut", "workers", "committed", "commits", "at")
    HEADER_FIELD_NUMBER: _ClassVar[int]
    CUT_FIELD_NUMBER: _ClassVar[int]
    WORKERS_FIELD_NUMBER: _ClassVar[int]
    COMMITTED_FIELD_NUMBER: _ClassVar[int]
    COMMITS_FIELD_NUMBER: _ClassVar[int]
    AT_FIELD_NUMBER: _ClassVar[int]
    header: _common_pb2.Header
    cut: int
    workers: _containers.RepeatedScalarFieldContainer[int]
    committed: int
    commits: RankCommits
    at: int
    def __init__(self, header: _Optional[_Union[_common_pb2.Header, _Mapping]] = ..., cut: _Optional[int] = ..., workers: _Optional[_Iterable[int]] = ..., committed: _Optional[int] = ..., commits: _Optional[_Union[RankCommits, _Mapping]] = ..., at: _Optional[int] = ...) -> None: ...

class AbortRequest(_message.Message):
    __slots__ = ("header", "cut")
    HEADER_FIELD_NUMBER: _ClassVar[int]
    CUT_FIELD_NUMBER: _ClassVar[int]
    header: _common_pb2.Header
    cut: int
    def __init__(self, header: _Optional[_Union[_common_pb2.Header, _Mapping]] = ..., cut: _Optional[int] = ...) -> None: ...

class WriteRequest(_message.Message):
    __slots__ = ("header", "cut", "root", "alone")
    HEADER_FIELD_NUMBER: _ClassVar[int]
    CUT_FIELD_NUMBER: _ClassVar[int]
    ROOT_FIELD_NUMBER: _ClassVar[int]
    ALONE_FIELD_NUMBER: _ClassVar[int]
    header: _common_pb2.Header
    cut: int
    root: str
    alone: bool
    def __init__(self, header: _Optional[_Union[_common_pb2.Header, _Mapping]] = ..., cut: _Optional[int] = ..., root: _Optional[str] = ..., alone: bool = ...) -> None: ...

class WriteReply(_message.Message):
    __slots__ = ("entries", "torn", "trouble")
    ENTRIES_FIELD_NUMBER: _ClassVar[int]
    TORN_FIELD_NUMBER: _ClassVar[int]
    TROUBLE_FIELD_NUMBER: _ClassVar[int]
    entries: str
    torn: bool
    trouble: str
    def __init__(self, entries: _Optional[str] = ..., torn: bool = ..., trouble: _Optional[str] = ...) -> None: ...

class ReplaceRequest(_message.Message):
    __slots__ = ("header", "table", "path", "number", "workers", "generation")
    HEADER_FIELD_NUMBER: _ClassVar[int]
    TABLE_FIELD_NUMBER: _ClassVar[int]
    PATH_FIELD_NUMBER: _ClassVar[int]
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    WORKERS_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    header: _common_pb2.Header
    table: str
    path: str
    number: int
    workers: _containers.RepeatedScalarFieldContainer[int]
    generation: int
    def __init__(self, header: _Optional[_Union[_common_pb2.Header, _Mapping]] = ..., table: _Optional[str] = ..., path: _Optional[str] = ..., number: _Optional[int] = ..., workers: _Optional[_Iterable[int]] = ..., generation: _Optional[int] = ...) -> None: ...

class ReplaceReply(_message.Message):
    __slots__ = ("rows",)
    ROWS_FIELD_NUMBER: _ClassVar[int]
    rows: int
    def __init__(self, rows: _Optional[int] = ...) -> None: ...

class DigestRequest(_message.Message):
    __slots__ = ("header", "cut")
    HEADER_FIELD_NUMBER: _ClassVar[int]
    CUT_FIELD_NUMBER: _ClassVar[int]
    header: _common_pb2.Header
    cut: int
    def __init__(self, header: _Optional[_Union[_common_pb2.Header, _Mapping]] = ..., cut: _Optional[int] = ...) -> None: ...

class DigestReply(_message.Message):
    __slots__ = ("digest", "rows", "torn")
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    ROWS_FIELD_NUMBER: _ClassVar[int]
    TORN_FIELD_NUMBER: _ClassVar[int]
    digest: bytes
    rows: int
    torn: bool
    def __init__(self, digest: _Optional[bytes] = ..., rows: _Optional[int] = ..., torn: bool = ...) -> None: ...

class ReplicateRequest(_message.Message):
    __slots__ = ("header", "stream", "first", "operations")
    HEADER_FIELD_NUMBER: _ClassVar[int]
    STREAM_FIELD_NUMBER: _ClassVar[int]
    FIRST_FIELD_NUMBER: _ClassVar[int]
    OPERATIONS_FIELD_NUMBER: _ClassVar[int]
    header: _common_pb2.Header
    stream: int
    first: int
    operations: _containers.RepeatedCompositeFieldContainer[Operation]
    def __init__(self, header: _Optional[_Union[_common_pb2.Header, _Mapping]] = ..., stream: _Optional[int] = ..., first: _Optional[int] = ..., operations: _Optional[_Iterable[_Union[Operation, _Mapping]]] = ...) -> None: ...

class Operation(_message.Message):
    __slots__ = ("blocks", "generations", "sequences", "push", "swept", "undone", "applied", "image", "tick")
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    GENERATIONS_FIELD_NUMBER: _ClassVar[int]
    SEQUENCES_FIELD_NUMBER: _ClassVar[int]
    PUSH_FIELD_NUMBER: _ClassVar[int]
    SWEPT_FIELD_NUMBER: _ClassVar[int]
    UNDONE_FIELD_NUMBER: _ClassVar[int]
    APPLIED_FIELD_NUMBER: _ClassVar[int]
    IMAGE_FIELD_NUMBER: _ClassVar[int]
    TICK_FIELD_NUMBER: _ClassVar[int]
    blocks: _common_pb2.Array
    generations: _common_pb2.Array
    sequences: _common_pb2.Array
    push: PushRequest
    swept: SweptRows
    undone: UndoneRows
    applied: AppliedStep
    image: BlockImage
    tick: int
    def __init__(self, blocks: _Optional[_Union[_common_pb2.Array, _Mapping]] = ..., generations: _Optional[_Union[_common_pb2.Array, _Mapping]] = ..., sequences: _Optional[_Union[_common_pb2.Array, _Mapping]] = ..., push: _Optional[_Union[PushRequest, _Mapping]] = ..., swept: _Optional[_Union[SweptRows, _Mapping]] = ..., undone: _Optional[_Union[UndoneRows, _Mapping]] = ..., applied: _Optional[_Union[AppliedStep, _Mapping]] = ..., image: _Optional[_Union[BlockImage, _Mapping]] = ..., tick: _Optional[int] = ...) -> None: ...

class SweptRows(_message.Message):
    __slots__ = ("gone", "decayed")
    GONE_FIELD_NUMBER: _ClassVar[int]
    DECAYED_FIELD_NUMBER: _ClassVar[int]
    gone: _common_pb2.Array
    decayed: _common_pb2.Array
    def __init__(self, gone: _Optional[_Union[_common_pb2.Array, _Mapping]] = ..., decayed: _Optional[_Union[_common_pb2.Array, _Mapping]] = ...) -> None: ...

class UndoneRows(_message.Message):
    __slots__ = ("keys", "steps")
    KEYS_FIELD_NUMBER: _ClassVar[int]
    STEPS_FIELD_NUMBER: _ClassVar[int]
    keys: TableKeys
    steps: int
    def __init__(self, keys: _Optional[_Union[TableKeys, _Mapping]] = ..., steps: _Optional[int] = ...) -> None: ...

class AppliedStep(_message.Message):
    __slots__ = ("step", "samples")
    STEP_FIELD_NUMBER: _ClassVar[int]
    SAMPLES_FIELD_NUMBER: _ClassVar[int]
    step: int
    samples: int
    def __init__(self, step: _Optional[int] = ..., samples: _Optional[int] = ...) -> None: ...

class BlockImage(_message.Message):
    __slots__ = ("records", "others", "waiting", "waited", "sketch", "left", "splits", "groups", "closed", "staged", "step")
    RECORDS_FIELD_NUMBER: _ClassVar[int]
    OTHERS_FIELD_NUMBER: _ClassVar[int]
    WAITING_FIELD_NUMBER: _ClassVar[int]
    WAITED_FIELD_NUMBER: _ClassVar[int]
    SKETCH_FIELD_NUMBER: _ClassVar[int]
    LEFT_FIELD_NUMBER: _ClassVar[int]
    SPLITS_FIELD_NUMBER: _ClassVar[int]
    GROUPS_FIELD_NUMBER: _ClassVar[int]
    CLOSED_FIELD_NUMBER: _ClassVar[int]
    STAGED_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    records: _common_pb2.Array
    others: _common_pb2.Array
    waiting: _common_pb2.Array
    waited: _common_pb2.Array
    sketch: _common_pb2.Array
    left: int
    splits: _common_pb2.Array
    groups: _common_pb2.Array
    closed: _common_pb2.ClosedSplits
    staged: _containers.RepeatedCompositeFieldContainer[PushRequest]
    step: int
    def __init__(self, records: _Optional[_Union[_common_pb2.Array, _Mapping]] = ..., others: _Optional[_Union[_common_pb2.Array, _Mapping]] = ..., waiting: _Optional[_Union[_common_pb2.Array, _Mapping]] = ..., waited: _Optional[_Union[_common_pb2.Array, _Mapping]] = ..., sketch: _Optional[_Union[_common_pb2.Array, _Mapping]] = ..., left: _Optional[int] = ..., splits: _Optional[_Union[_common_pb2.Array, _Mapping]] = ..., groups: _Optional[_Union[_common_pb2.Array, _Mapping]] = ..., closed: _Optional[_Union[_common_pb2.ClosedSplits, _Mapping]] = ..., staged: _Optional[_Iterable[_Union[PushRequest, _Mapping]]] = ..., step: _Optional[int] = ...) -> None: ...

class ReplicateReply(_message.Message):
    __slots__ = ("next", "refused", "generations", "failure")
    NEXT_FIELD_NUMBER: _ClassVar[int]
    REFUSED_FIELD_NUMBER: _ClassVar[int]
    GENERATIONS_FIELD_NUMBER: _ClassVar[int]
    FAILURE_FIELD_NUMBER: _ClassVar[int]
    next: int
    refused: _common_pb2.Array
    generations: _common_pb2.Array
    failure: _common_pb2.Failure
    def __init__(self, next: _Optional[int] = ..., refused: _Optional[_Union[_common_pb2.Array, _Mapping]] = ..., generations: _Optional[_Union[_common_pb2.Array, _Mapping]] = ..., failure: _Optional[_Union[_common_pb2.Failure, _Mapping]] = ...) -> None: ...

class CopyRequest(_message.Message):
    __slots__ = ("header", "blocks", "shard", "generations", "leisurely")
    HEADER_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    SHARD_FIELD_NUMBER: _ClassVar[int]
    GENERATIONS_FIELD_NUMBER: _ClassVar[int]
    LEISURELY_FIELD_NUMBER: _ClassVar[int]
    header: _common_pb2.Header
    blocks: _common_pb2.Array
    shard: int
    generations: _common_pb2.Array
    leisurely: bool
    def __init__(self, header: _Optional[_Union[_common_pb2.Header, _Mapping]] = ..., blocks: _Optional[_Union[_common_pb2.Array, _Mapping]] = ..., shard: _Optional[int] = ..., generations: _Optional[_Union[_common_pb2.Array, _Mapping]] = ..., leisurely: bool = ...) -> None: ...

class HandOverRequest(_message.Message):
    __slots__ = ("header", "blocks", "shard", "generations", "order")
    HEADER_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    SHARD_FIELD_NUMBER: _ClassVar[int]
    GENERATIONS_FIELD_NUMBER: _ClassVar[int]
    ORDER_FIELD_NUMBER: _ClassVar[int]
    header: _common_pb2.Header
    blocks: _common_pb2.Array
    shard: int
    generations: _common_pb2.Array
    order: int
    def __init__(self, header: _Optional[_Union[_common_pb2.Header, _Mapping]] = ..., blocks: _Optional[_Union[_common_pb2.Array, _Mapping]] = ..., shard: _Optional[int] = ..., generations: _Optional[_Union[_common_pb2.Array, _Mapping]] = ..., order: _Optional[int] = ...) -> None: ...

class ReopenRequest(_message.Message):
    __slots__ = ("header", "blocks", "generations", "term", "order")
    HEADER_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    GENERATIONS_FIELD_NUMBER: _ClassVar[int]
    TERM_FIELD_NUMBER: _ClassVar[int]
    ORDER_FIELD_NUMBER: _ClassVar[int]
    header: _common_pb2.Header
    blocks: _common_pb2.Array
    generations: _common_pb2.Array
    term: int
    order: int
    def __init__(self, header: _Optional[_Union[_common_pb2.Header, _Mapping]] = ..., blocks: _Optional[_Union[_common_pb2.Array, _Mapping]] = ..., generations: _Optional[_Union[_common_pb2.Array, _Mapping]] = ..., term: _Optional[int] = ..., order: _Optional[int] = ...) -> None: ...

class HeldRequest(_message.Message):
    __slots__ = ("header", "blocks")
    HEADER_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    header: _common_pb2.Header
    blocks: _common_pb2.Array
    def __init__(self, header: _Optional[_Union[_common_pb2.Header, _Mapping]] = ..., blocks: _Optional[_Union[_common_pb2.Array, _Mapping]] = ...) -> None: ...

class HeldReply(_message.Message):
    __slots__ = ("generations", "sequences")
    GENERATIONS_FIELD_NUMBER: _ClassVar[int]
    SEQUENCES_FIELD_NUMBER: _ClassVar[int]
    generations: _common_pb2.Array
    sequences: _common_pb2.Array
    def __init__(self, generations: _Optional[_Union[_common_pb2.Array, _Mapping]] = ..., sequences: _Optional[_Union[_common_pb2.Array, _Mapping]] = ...) -> None: ...

class ShardStatsReply(_message.Message):
    __slots__ = ("stats",)
    STATS_FIELD_NUMBER: _ClassVar[int]
    stats: str
    def __init__(self, stats: _Optional[str] = ...) -> None: ...

class ShardStatsRequest(_message.Message):
    __slots__ = ("header",)
    HEADER_FIELD_NUMBER: _ClassVar[int]
    header: _common_pb2.Header
    def __init__(self, header: _Optional[_Union[_common_pb2.Header, _Mapping]] = ...) -> None: ...

class ChangesRequest(_message.Message):
    __slots__ = ("header", "blocks", "sequences", "least", "takes", "dense", "dense_stamps")
    HEADER_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    SEQUENCES_FIELD_NUMBER: _ClassVar[int]
    LEAST_FIELD_NUMBER: _ClassVar[int]
    TAKES_FIELD_NUMBER: _ClassVar[int]
    DENSE_FIELD_NUMBER: _ClassVar[int]
    DENSE_STAMPS_FIELD_NUMBER: _ClassVar[int]
    header: _common_pb2.Header
    blocks: _common_pb2.Array
    sequences: _common_pb2.Array
    least: _common_pb2.Array
    takes: _common_pb2.Array
    dense: _common_pb2.Array
    dense_stamps: _common_pb2.Array
    def __init__(self, header: _Optional[_Union[_common_pb2.Header, _Mapping]] = ..., blocks: _Optional[_Union[_common_pb2.Array, _Mapping]] = ..., sequences: _Optional[_Union[_common_pb2.Array, _Mapping]] = ..., least: _Optional[_Union[_common_pb2.Array, _Mapping]] = ..., takes: _Optional[_Union[_common_pb2.Array, _Mapping]] = ..., dense: _Optional[_Union[_common_pb2.Array, _Mapping]] = ..., dense_stamps: _Optional[_Union[_common_pb2.Array, _Mapping]] = ...) -> None: ...

class TableChanges(_message.Message):
    __slots__ = ("table", "whole", "blocks", "before", "after", "counts", "keys", "rows", "gone_counts", "gone", "next")
    TABLE_FIELD_NUMBER: _ClassVar[int]
    WHOLE_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    BEFORE_FIELD_NUMBER: _ClassVar[int]
    AFTER_FIELD_NUMBER: _ClassVar[int]
    COUNTS_FIELD_NUMBER: _ClassVar[int]
    KEYS_FIELD_NUMBER: _ClassVar[int]
    ROWS_FIELD_NUMBER: _ClassVar[int]
    GONE_COUNTS_FIELD_NUMBER: _ClassVar[int]
    GONE_FIELD_NUMBER: _ClassVar[int]
    NEXT_FIELD_NUMBER: _ClassVar[int]
    table: int
    whole: bool
    blocks: _common_pb2.Array
    before: _common_pb2.Array
    after: _common_pb2.Array
    counts: _common_pb2.Array
    keys: _common_pb2.Array
    rows: _common_pb2.Array
    gone_counts: _common_pb2.Array
    gone: _common_pb2.Array
    next: int
    def __init__(self, table: _Optional[int] = ..., whole: bool = ..., blocks: _Optional[_Union[_common_pb2.Array, _Mapping]] = ..., before: _Optional[_Union[_common_pb2.Array, _Mapping]] = ..., after: _Optional[_Union[_common_pb2.Array, _Mapping]] = ..., counts: _Optional[_Union[_common_pb2.Array, _Mapping]] = ..., keys: _Optional[_Union[_common_pb2.Array, _Mapping]] = ..., rows: _Optional[_Union[_common_pb2.Array, _Mapping]] = ..., gone_counts: _Optional[_Union[_common_pb2.Array, _Mapping]] = ..., gone: _Optional[_Union[_common_pb2.Array, _Mapping]] = ..., next: _Optional[int] = ...) -> None: ...

class ChangesReply(_message.Message):
    __slots__ = ("tables", "moved", "where", "more", "age_seconds", "take", "whole", "dense", "dense_stamps", "dense_values", "dense_left")
    TABLES_FIELD_NUMBER: _ClassVar[int]
    MOVED_FIELD_NUMBER: _ClassVar[int]
    WHERE_FIELD_NUMBER: _ClassVar[int]
    MORE_FIELD_NUMBER: _ClassVar[int]
    AGE_SECONDS_FIELD_NUMBER: _ClassVar[int]
    TAKE_FIELD_NUMBER: _ClassVar[int]
    WHOLE_FIELD_NUMBER: _ClassVar[int]
    DENSE_FIELD_NUMBER: _ClassVar[int]
    DENSE_STAMPS_FIELD_NUMBER: _ClassVar[int]
    DENSE_VALUES_FIELD_NUMBER: _ClassVar[int]
    DENSE_LEFT_FIELD_NUMBER: _ClassVar[int]
    tables: _containers.RepeatedCompositeFieldContainer[TableChanges]
    moved: _common_pb2.Array
    where: _common_pb2.Placement
    more: bool
    age_seconds: float
    take: int
    whole: _common_pb2.Array
    dense: _common_pb2.Array
    dense_stamps: _common_pb2.Array
    dense_values: _common_pb2.Array
    dense_left: int
    def __init__(self, tables: _Optional[_Iterable[_Union[TableChanges, _Mapping]]] = ..., moved: _Optional[_Union[_common_pb2.Array, _Mapping]] = ..., where: _Optional[_Union[_common_pb2.Placement, _Mapping]] = ..., more: bool = ..., age_seconds: _Optional[float] = ..., take: _Optional[int] = ..., whole: _Optional[_Union[_common_pb2.Array, _Mapping]] = ..., dense: _Optional[_Union[_common_pb2.Array, _Mapping]] = ..., dense_stamps: _Optional[_Union[_common_pb2.Array, _Mapping]] = ..., dense_values: _Optional[_Union[_common_pb2.Array, _Mapping]] = ..., dense_left: _Optional[int] = ...) -> None: ...

class RowsRequest(_message.Message):
    __slots__ = ("header", "verb", "keys", "block", "least", "tick", "steps", "number")
    HEADER_FIELD_NUMBER: _ClassVar[int]
    VERB_FIELD_NUMBER: _ClassVar[int]
    KEYS_FIELD_NUMBER: _ClassVar[int]
    BLOCK_FIELD_NUMBER: _ClassVar[int]
    LEAST_FIELD_NUMBER: _ClassVar[int]
    TICK_FIELD_NUMBER: _ClassVar[int]
    STEPS_FIELD_NUMBER: _ClassVar[int]
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    header: _common_pb2.Header
    verb: RowsVerb
    keys: TableKeys
    block: int
    least: int
    tick: int
    steps: int
    number: int
    def __init__(self, header: _Optional[_Union[_common_pb2.Header, _Mapping]] = ..., verb: _Optional[_Union[RowsVerb, str]] = ..., keys: _Optional[_Union[TableKeys, _Mapping]] = ..., block: _Optional[int] = ..., least: _Optional[int] = ..., tick: _Optional[int] = ..., steps: _Optional[int] = ..., number: _Optional[int] = ...) -> None: ...

class RowsReply(_message.Message):
    __slots__ = ("keys", "present", "weights", "state", "counters", "more", "next", "facts", "undone", "refused")
    KEYS_FIELD_NUMBER: _ClassVar[int]
    PRESENT_FIELD_NUMBER: _ClassVar[int]
    WEIGHTS_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    COUNTERS_FIELD_NUMBER: _ClassVar[int]
    MORE_FIELD_NUMBER: _ClassVar[int]
    NEXT_FIELD_NUMBER: _ClassVar[int]
    FACTS_FIELD_NUMBER: _ClassVar[int]
    UNDONE_FIELD_NUMBER: _ClassVar[int]
    REFUSED_FIELD_NUMBER: _ClassVar[int]
    keys: _common_pb2.Array
    present: _common_pb2.Array
    weights: _common_pb2.Array
    state: _common_pb2.Array
    counters: _common_pb2.Array
    more: bool
    next: int
    facts: _containers.RepeatedScalarFieldContainer[str]
    undone: _common_pb2.Array
    refused: int
    def __init__(self, keys: _Optional[_Union[_common_pb2.Array, _Mapping]] = ..., present: _Optional[_Union[_common_pb2.Array, _Mapping]] = ..., weights: _Optional[_Union[_common_pb2.Array, _Mapping]] = ..., state: _Optional[_Union[_common_pb2.Array, _Mapping]] = ..., counters: _Optional[_Union[_common_pb2.Array, _Mapping]] = ..., more: bool = ..., next: _Optional[int] = ..., facts: _Optional[_Iterable[str]] = ..., undone: _Optional[_Union[_common_pb2.Array, _Mapping]] = ..., refused: _Optional[int] = ...) -> None: ...
