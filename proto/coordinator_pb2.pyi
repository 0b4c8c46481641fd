from oarlock.proto import common_pb2 as _common_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Role(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    ROLE_UNSPECIFIED: _ClassVar[Role]
    SHARD: _ClassVar[Role]
    WORKER: _ClassVar[Role]

class Work(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    WORK_UNSPECIFIED: _ClassVar[Work]
    TRAIN: _ClassVar[Work]
    EVALUATE: _ClassVar[Work]
    WAIT: _ClassVar[Work]
    FINISHED: _ClassVar[Work]

class Told(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    TOLD_UNSPECIFIED: _ClassVar[Told]
    ADDED: _ClassVar[Told]
    HANDED: _ClassVar[Told]
    CONFIRMED: _ClassVar[Told]
    LACKING: _ClassVar[Told]
    SLOW: _ClassVar[Told]
ROLE_UNSPECIFIED: Role
SHARD: Role
WORKER: Role
WORK_UNSPECIFIED: Work
TRAIN: Work
EVALUATE: Work
WAIT: Work
FINISHED: Work
TOLD_UNSPECIFIED: Told
ADDED: Told
HANDED: Told
CONFIRMED: Told
LACKING: Told
SLOW: Told

class JoinRequest(_message.Message):
    __slots__ = ("protocol", "role", "address", "nonce", "pid", "host", "reader", "signature")
    PROTOCOL_FIELD_NUMBER: _ClassVar[int]
    ROLE_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    NONCE_FIELD_NUMBER: _ClassVar[int]
    PID_FIELD_NUMBER: _ClassVar[int]
    HOST_FIELD_NUMBER: _ClassVar[int]
    READER_FIELD_NUMBER: _ClassVar[int]
    SIGNATURE_FIELD_NUMBER: _ClassVar[int]
    protocol: int
    role: Role
    address: str
    nonce: int
    pid: int
    host: str
    reader: str
    signature: str
    def __init__(self, protocol: _Optional[int] = ..., role: _Optional[_Union[Role, str]] = ..., address: _Optional[str] = ..., nonce: _Optional[int] = ..., pid: _Optional[int] = ..., host: _Optional[str] = ..., reader: _Optional[str] = ..., signature: _Optional[str] = ...) -> None: ...

class JoinReply(_message.Message):
    __slots__ = ("job", "run", "term", "id", "incarnation", "spec", "lease_seconds", "heartbeat_seconds", "placement", "opened")
    JOB_FIELD_NUMBER: _ClassVar[int]
    RUN_FIELD_NUMBER: _ClassVar[int]
    TERM_FIELD_NUMBER: _ClassVar[int]
    ID_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    SPEC_FIELD_NUMBER: _ClassVar[int]
    LEASE_SECONDS_FIELD_NUMBER: _ClassVar[int]
    HEARTBEAT_SECONDS_FIELD_NUMBER: _ClassVar[int]
    PLACEMENT_FIELD_NUMBER: _ClassVar[int]
    OPENED_FIELD_NUMBER: _ClassVar[int]
    job: bytes
    run: int
    term: int
    id: int
    incarnation: int
    spec: str
    lease_seconds: float
    heartbeat_seconds: float
    placement: _common_pb2.Placement
    opened: int
    def __init__(self, job: _Optional[bytes] = ..., run: _Optional[int] = ..., term: _Optional[int] = ..., id: _Optional[int] = ..., incarnation: _Optional[int] = ..., spec: _Optional[str] = ..., lease_seconds: _Optional[float] = ..., heartbeat_seconds: _Optional[float] = ..., placement: _Optional[_Union[_common_pb2.Placement, _Mapping]] = ..., opened: _Optional[int] = ...) -> None: ...

class Clock(_message.Message):
    __slots__ = ("active", "acknowledged", "heard")
    ACTIVE_FIELD_NUMBER: _ClassVar[int]
    ACKNOWLEDGED_FIELD_NUMBER: _ClassVar[int]
    HEARD_FIELD_NUMBER: _ClassVar[int]
    active: bool
    acknowledged: int
    heard: int
    def __init__(self, active: bool = ..., acknowledged: _Optional[int] = ..., heard: _Optional[int] = ...) -> None: ...

class HeartbeatRequest(_message.Message):
    __slots__ = ("header", "stats", "clock", "held", "evaluations", "asking", "ranks", "losses")
    HEADER_FIELD_NUMBER: _ClassVar[int]
    STATS_FIELD_NUMBER: _ClassVar[int]
    CLOCK_FIELD_NUMBER: _ClassVar[int]
    HELD_FIELD_NUMBER: _ClassVar[int]
    EVALUATIONS_FIELD_NUMBER: _ClassVar[int]
    ASKING_FIELD_NUMBER: _ClassVar[int]
    RANKS_FIELD_NUMBER: _ClassVar[int]
    LOSSES_FIELD_NUMBER: _ClassVar[int]
    header: _common_pb2.Header
    stats: str
    clock: Clock
    held: _containers.RepeatedScalarFieldContainer[int]
    evaluations: _containers.RepeatedScalarFieldContainer[int]
    asking: bool
    ranks: _containers.RepeatedScalarFieldContainer[int]
    losses: _containers.RepeatedCompositeFieldContainer[LossCount]
    def __init__(self, header: _Optional[_Union[_common_pb2.Header, _Mapping]] = ..., stats: _Optional[str] = ..., clock: _Optional[_Union[Clock, _Mapping]] = ..., held: _Optional[_Iterable[int]] = ..., evaluations: _Optional[_Iterable[int]] = ..., asking: bool = ..., ranks: _Optional[_Iterable[int]] = ..., losses: _Optional[_Iterable[_Union[LossCount, _Mapping]]] = ...) -> None: ...

class LossCount(_message.Message):
    __slots__ = ("generation", "pushes", "more")
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    PUSHES_FIELD_NUMBER: _ClassVar[int]
    MORE_FIELD_NUMBER: _ClassVar[int]
    generation: int
    pushes: int
    more: bool
    def __init__(self, generation: _Optional[int] = ..., pushes: _Optional[int] = ..., more: bool = ...) -> None: ...

class HeartbeatReply(_message.Message):
    __slots__ = ("term", "generation", "phase", "step", "minimum", "opened", "gate", "gate_seconds", "committed", "leave", "lost")
    TERM_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    PHASE_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    MINIMUM_FIELD_NUMBER: _ClassVar[int]
    OPENED_FIELD_NUMBER: _ClassVar[int]
    GATE_FIELD_NUMBER: _ClassVar[int]
    GATE_SECONDS_FIELD_NUMBER: _ClassVar[int]
    COMMITTED_FIELD_NUMBER: _ClassVar[int]
    LEAVE_FIELD_NUMBER: _ClassVar[int]
    LOST_FIELD_NUMBER: _ClassVar[int]
    term: int
    generation: int
    phase: str
    step: int
    minimum: int
    opened: int
    gate: int
    gate_seconds: float
    committed: int
    leave: bool
    lost: _containers.RepeatedCompositeFieldContainer[LossQuestion]
    def __init__(self, term: _Optional[int] = ..., generation: _Optional[int] = ..., phase: _Optional[str] = ..., step: _Optional[int] = ..., minimum: _Optional[int] = ..., opened: _Optional[int] = ..., gate: _Optional[int] = ..., gate_seconds: _Optional[float] = ..., committed: _Optional[int] = ..., leave: bool = ..., lost: _Optional[_Iterable[_Union[LossQuestion, _Mapping]]] = ...) -> None: ...

class LossQuestion(_message.Message):
    __slots__ = ("generation", "cut", "blocks")
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    CUT_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    generation: int
    cut: int
    blocks: _common_pb2.Array
    def __init__(self, generation: _Optional[int] = ..., cut: _Optional[int] = ..., blocks: _Optional[_Union[_common_pb2.Array, _Mapping]] = ...) -> None: ...

class PlacementRequest(_message.Message):
    __slots__ = ("header", "whole")
    HEADER_FIELD_NUMBER: _ClassVar[int]
    WHOLE_FIELD_NUMBER: _ClassVar[int]
    header: _common_pb2.Header
    whole: bool
    def __init__(self, header: _Optional[_Union[_common_pb2.Header, _Mapping]] = ..., whole: bool = ...) -> None: ...

class LeaseRequest(_message.Message):
    __slots__ = ("header", "wanted", "number", "held", "evaluations", "clock", "ranks")
    HEADER_FIELD_NUMBER: _ClassVar[int]
    WANTED_FIELD_NUMBER: _ClassVar[int]
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    HELD_FIELD_NUMBER: _ClassVar[int]
    EVALUATIONS_FIELD_NUMBER: _ClassVar[int]
    CLOCK_FIELD_NUMBER: _ClassVar[int]
    RANKS_FIELD_NUMBER: _ClassVar[int]
    header: _common_pb2.Header
    wanted: int
    number: int
    held: _containers.RepeatedScalarFieldContainer[int]
    evaluations: _containers.RepeatedScalarFieldContainer[int]
    clock: Clock
    ranks: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, header: _Optional[_Union[_common_pb2.Header, _Mapping]] = ..., wanted: _Optional[int] = ..., number: _Optional[int] = ..., held: _Optional[_Iterable[int]] = ..., evaluations: _Optional[_Iterable[int]] = ..., clock: _Optional[_Union[Clock, _Mapping]] = ..., ranks: _Optional[_Iterable[int]] = ...) -> None: ...

class LeaseReply(_message.Message):
    __slots__ = ("work", "splits", "fresh", "retry_seconds", "minimum", "opened", "gate", "gate_seconds", "ranks", "epoch")
    WORK_FIELD_NUMBER: _ClassVar[int]
    SPLITS_FIELD_NUMBER: _ClassVar[int]
    FRESH_FIELD_NUMBER: _ClassVar[int]
    RETRY_SECONDS_FIELD_NUMBER: _ClassVar[int]
    MINIMUM_FIELD_NUMBER: _ClassVar[int]
    OPENED_FIELD_NUMBER: _ClassVar[int]
    GATE_FIELD_NUMBER: _ClassVar[int]
    GATE_SECONDS_FIELD_NUMBER: _ClassVar[int]
    RANKS_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    work: Work
    splits: _containers.RepeatedScalarFieldContainer[int]
    fresh: _containers.RepeatedScalarFieldContainer[bool]
    retry_seconds: float
    minimum: int
    opened: int
    gate: int
    gate_seconds: float
    ranks: _containers.RepeatedScalarFieldContainer[int]
    epoch: int
    def __init__(self, work: _Optional[_Union[Work, str]] = ..., splits: _Optional[_Iterable[int]] = ..., fresh: _Optional[_Iterable[bool]] = ..., retry_seconds: _Optional[float] = ..., minimum: _Optional[int] = ..., opened: _Optional[int] = ..., gate: _Optional[int] = ..., gate_seconds: _Optional[float] = ..., ranks: _Optional[_Iterable[int]] = ..., epoch: _Optional[int] = ...) -> None: ...

class GateRequest(_message.Message):
    __slots__ = ("header", "cut")
    HEADER_FIELD_NUMBER: _ClassVar[int]
    CUT_FIELD_NUMBER: _ClassVar[int]
    header: _common_pb2.Header
    cut: int
    def __init__(self, header: _Optional[_Union[_common_pb2.Header, _Mapping]] = ..., cut: _Optional[int] = ...) -> None: ...

class GateReply(_message.Message):
    __slots__ = ("opened",)
    OPENED_FIELD_NUMBER: _ClassVar[int]
    opened: int
    def __init__(self, opened: _Optional[int] = ...) -> None: ...

class CloseSplitRequest(_message.Message):
    __slots__ = ("header", "work", "split", "samples", "loss_sum", "sums", "groups", "scores")
    HEADER_FIELD_NUMBER: _ClassVar[int]
    WORK_FIELD_NUMBER: _ClassVar[int]
    SPLIT_FIELD_NUMBER: _ClassVar[int]
    SAMPLES_FIELD_NUMBER: _ClassVar[int]
    LOSS_SUM_FIELD_NUMBER: _ClassVar[int]
    SUMS_FIELD_NUMBER: _ClassVar[int]
    GROUPS_FIELD_NUMBER: _ClassVar[int]
    SCORES_FIELD_NUMBER: _ClassVar[int]
    header: _common_pb2.Header
    work: Work
    split: int
    samples: int
    loss_sum: float
    sums: _containers.RepeatedScalarFieldContainer[float]
    groups: int
    scores: bytes
    def __init__(self, header: _Optional[_Union[_common_pb2.Header, _Mapping]] = ..., work: _Optional[_Union[Work, str]] = ..., split: _Optional[int] = ..., samples: _Optional[int] = ..., loss_sum: _Optional[float] = ..., sums: _Optional[_Iterable[float]] = ..., groups: _Optional[int] = ..., scores: _Optional[bytes] = ...) -> None: ...

class ReleaseRequest(_message.Message):
    __slots__ = ("header", "splits", "evaluations", "reason")
    HEADER_FIELD_NUMBER: _ClassVar[int]
    SPLITS_FIELD_NUMBER: _ClassVar[int]
    EVALUATIONS_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    header: _common_pb2.Header
    splits: _containers.RepeatedScalarFieldContainer[int]
    evaluations: _containers.RepeatedScalarFieldContainer[int]
    reason: str
    def __init__(self, header: _Optional[_Union[_common_pb2.Header, _Mapping]] = ..., splits: _Optional[_Iterable[int]] = ..., evaluations: _Optional[_Iterable[int]] = ..., reason: _Optional[str] = ...) -> None: ...

class LeaveRequest(_message.Message):
    __slots__ = ("header", "error")
    HEADER_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    header: _common_pb2.Header
    error: str
    def __init__(self, header: _Optional[_Union[_common_pb2.Header, _Mapping]] = ..., error: _Optional[str] = ...) -> None: ...

class ReportRequest(_message.Message):
    __slots__ = ("header", "told", "blocks", "generations", "shard", "order", "term")
    HEADER_FIELD_NUMBER: _ClassVar[int]
    TOLD_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    GENERATIONS_FIELD_NUMBER: _ClassVar[int]
    SHARD_FIELD_NUMBER: _ClassVar[int]
    ORDER_FIELD_NUMBER: _ClassVar[int]
    TERM_FIELD_NUMBER: _ClassVar[int]
    header: _common_pb2.Header
    told: Told
    blocks: _common_pb2.Array
    generations: _common_pb2.Array
    shard: int
    order: int
    term: int
    def __init__(self, header: _Optional[_Union[_common_pb2.Header, _Mapping]] = ..., told: _Optional[_Union[Told, str]] = ..., blocks: _Optional[_Union[_common_pb2.Array, _Mapping]] = ..., generations: _Optional[_Union[_common_pb2.Array, _Mapping]] = ..., shard: _Optional[int] = ..., order: _Optional[int] = ..., term: _Optional[int] = ...) -> None: ...

class ReportReply(_message.Message):
    __slots__ = ("record",)
    RECORD_FIELD_NUMBER: _ClassVar[int]
    record: _common_pb2.Placement
    def __init__(self, record: _Optional[_Union[_common_pb2.Placement, _Mapping]] = ...) -> None: ...

class ScaleRequest(_message.Message):
    __slots__ = ("servers", "workers")
    SERVERS_FIELD_NUMBER: _ClassVar[int]
    WORKERS_FIELD_NUMBER: _ClassVar[int]
    servers: int
    workers: int
    def __init__(self, servers: _Optional[int] = ..., workers: _Optional[int] = ...) -> None: ...

class ScaleReply(_message.Message):
    __slots__ = ("servers", "workers", "said")
    SERVERS_FIELD_NUMBER: _ClassVar[int]
    WORKERS_FIELD_NUMBER: _ClassVar[int]
    SAID_FIELD_NUMBER: _ClassVar[int]
    servers: int
    workers: int
    said: str
    def __init__(self, servers: _Optional[int] = ..., workers: _Optional[int] = ..., said: _Optional[str] = ...) -> None: ...

class StatusRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class StatusReply(_message.Message):
    __slots__ = ("status",)
    STATUS_FIELD_NUMBER: _ClassVar[int]
    status: str
    def __init__(self, status: _Optional[str] = ...) -> None: ...

class StopRequest(_message.Message):
    __slots__ = ("checkpoint", "reason")
    CHECKPOINT_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    checkpoint: bool
    reason: str
    def __init__(self, checkpoint: bool = ..., reason: _Optional[str] = ...) -> None: ...

class CheckpointRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class CheckpointReply(_message.Message):
    __slots__ = ("last",)
    LAST_FIELD_NUMBER: _ClassVar[int]
    last: int
    def __init__(self, last: _Optional[int] = ...) -> None: ...

class LiveDigestRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class LiveDigestReply(_message.Message):
    __slots__ = ("last",)
    LAST_FIELD_NUMBER: _ClassVar[int]
    last: int
    def __init__(self, last: _Optional[int] = ...) -> None: ...

class RollbackRequest(_message.Message):
    __slots__ = ("table", "path")
    TABLE_FIELD_NUMBER: _ClassVar[int]
    PATH_FIELD_NUMBER: _ClassVar[int]
    table: str
    path: str
    def __init__(self, table: _Optional[str] = ..., path: _Optional[str] = ...) -> None: ...

class RollbackReply(_message.Message):
    __slots__ = ("number",)
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    number: int
    def __init__(self, number: _Optional[int] = ...) -> None: ...

class DescribeRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class DescribeReply(_message.Message):
    __slots__ = ("job", "run", "spec", "placement", "step")
    JOB_FIELD_NUMBER: _ClassVar[int]
    RUN_FIELD_NUMBER: _ClassVar[int]
    SPEC_FIELD_NUMBER: _ClassVar[int]
    PLACEMENT_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    job: bytes
    run: int
    spec: str
    placement: _common_pb2.Placement
    step: int
    def __init__(self, job: _Optional[bytes] = ..., run: _Optional[int] = ..., spec: _Optional[str] = ..., placement: _Optional[_Union[_common_pb2.Placement, _Mapping]] = ..., step: _Optional[int] = ...) -> None: ...
