# SPDX-License-Identifier: Apache-2.0
"""The coordinator's service: messages checked and turned into calls, answers into messages. Called from many threads."""

import json
import math
import re
from typing import Any

from oarlock import __version__
from oarlock.client.job import OVER, STOPPING, TRAINING, WRITING
from oarlock.client.membership import STAYS
from oarlock.cluster.coordinator import Coordinator
from oarlock.cluster.evaluation import check
from oarlock.cluster.members import Member
from oarlock.cluster.ranks import check_signature, read_ranks
from oarlock.cluster.reports import report
from oarlock.cluster.scaling import scale
from oarlock.cluster.splits import close_split, evaluated, release
from oarlock.proto.common_pb2 import Empty, Header, HelloReply, HelloRequest, Placement
from oarlock.proto.coordinator_pb2 import (
    EVALUATE,
    FINISHED,
    SHARD,
    TRAIN,
    WAIT,
    WORKER,
    CheckpointReply,
    CheckpointRequest,
    CloseSplitRequest,
    DescribeReply,
    DescribeRequest,
    GateReply,
    GateRequest,
    HeartbeatReply,
    HeartbeatRequest,
    JoinReply,
    JoinRequest,
    LeaseReply,
    LeaseRequest,
    LeaveRequest,
    LiveDigestReply,
    LiveDigestRequest,
    PlacementRequest,
    ReleaseRequest,
    ReportReply,
    ReportRequest,
    RollbackReply,
    RollbackRequest,
    ScaleReply,
    ScaleRequest,
    StatusReply,
    StatusRequest,
    StopRequest,
)
from oarlock.proto.errors import InvalidArgument, Malformed, Unavailable, WrongJob, WrongRun
from oarlock.proto.version import check_protocol, hello

MAX_SPLITS = 64
MAX_LOSSES = 4096
MAX_STATS = 1 << 16
# Objects within objects: a shard's statistics have its tables' rows in them.
MAX_STATS_LEVELS = 4
_ADDRESS = re.compile(r"unix:[^\s]{1,200}|[^\s/]{1,253}:[0-9]{1,5}|in-process:[^\s]{1,100}")
_WORK = {"train": TRAIN, "evaluate": EVALUATE, "wait": WAIT, "finished": FINISHED}


def _no_number(name: str) -> None:
    raise ValueError(f"{name} is no number of JSON")


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        _no_number(text[:20])
    return number


def _is_flat(value: object, levels: int = MAX_STATS_LEVELS) -> bool:
    if isinstance(value, dict | list):
        return levels > 0 and all(
            _is_flat(v, levels - 1) for v in (value.values() if isinstance(value, dict) else value)
        )
    return True


def read_stats(text: str) -> dict[str, Any]:
    """Return a member's statistics; Malformed for what could not be kept, copied and told on as it is."""
    if len(text) > MAX_STATS:
        raise InvalidArgument(f"statistics of {len(text)} bytes, at most {MAX_STATS}")
    try:
        stats = json.loads(text or "{}", parse_constant=_no_number, parse_float=_finite)
        # An escape can stand for half a character, which no file or terminal takes.
        json.dumps(stats, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise Malformed(f"statistics that are no JSON: {error}") from None
    if not isinstance(stats, dict):
        raise Malformed("statistics that are no JSON object")
    if not _is_flat(stats):
        raise Malformed(f"statistics of more than {MAX_STATS_LEVELS} levels")
    return stats


class CoordinatorService:
    """Answers the methods of ``Coordinator`` in proto/methods.py, for the ``newest`` of one process's coordinators."""

    def __init__(self, coordinator: Coordinator) -> None:
        self.newest = coordinator

    @property
    def _coordinator(self) -> Coordinator:
        """Who is in charge; Unavailable between two runs."""
        c = self.newest
        if c.handed_on is not None:
            raise Unavailable(f"job {c.spec.name} goes back: its next run has not begun yet")
        return c

    def take_over(self, coordinator: Coordinator) -> None:
        """Answer for ``coordinator`` from now on; it hears who stopped the job while nobody was in charge."""
        before, self.newest = self.newest, coordinator
        if before.stop_wanted is not None:
            coordinator.stop(before.stop_wanted, before.stop_reason)

    def _member(self, header: Header, role: str | None = None) -> Member:
        """Return the sender, its lease renewed; refuse by name whoever does not belong."""
        c = self._coordinator
        check_protocol(header.protocol)
        if header.job != c.spec.job_bytes:
            raise WrongJob(
                f"this is the coordinator of job {c.spec.job}, the message is of job {header.job[:16].hex() or 'none'}"
            )
        if header.run != c.run:
            stays = {STAYS: True} if c.going_back.stays(header.run, c.run) else {}
            words = f"the job is in run {c.run}, the message is of run {header.run}: join anew"
            raise WrongRun(words, run=c.run, **stays)
        if header.term > c.term:
            raise Unavailable(f"this coordinator is of term {c.term}, one of term {header.term} has taken its place")
        with c.lock:
            member = c.members.renew(header.sender, c.clock())
        if role is not None and member.role != role:
            raise InvalidArgument(f"only a {role} may ask this; incarnation {member.incarnation} is a {member.role}")
        return member

    def _still(self, member: Member) -> None:
        """Refuse whoever was struck off by another thread since its header passed: what it is given now nobody takes back."""
        self._coordinator.members.renew(member.incarnation, self._coordinator.clock())

    def hello(self, request: HelloRequest) -> HelloReply:
        return hello(request, "coordinator", __version__)

    def join(self, request: JoinRequest) -> JoinReply:
        c = self._coordinator
        check_protocol(request.protocol)
        roles = {SHARD: "shard", WORKER: "worker"}
        if request.role not in roles or not request.nonce:
            raise Malformed("a Join needs a role (shard or worker) and a nonce")
        if request.role == SHARD and not _ADDRESS.fullmatch(request.address):
            raise InvalidArgument(f"a shard's address {request.address[:100]!r} is neither host:port nor unix:PATH")
        with c.lock:
            if request.role == WORKER:
                check_signature(c, request.signature)
            member = c.join(
                roles[request.role],
                request.address if request.role == SHARD else "",
                request.nonce,
                request.pid,
                request.host[:256],
                request.reader[:32],
            )
            return JoinReply(
                opened=c.cuts.opened,
                job=c.spec.job_bytes,
                run=c.run,
                term=c.term,
                id=member.id,
                incarnation=member.incarnation,
                spec=c.spec_json,
                lease_seconds=c.spec.lease_seconds,
                heartbeat_seconds=c.spec.heartbeat_seconds,
                placement=c.placement() if c.placed else None,
            )

    def heartbeat(self, request: HeartbeatRequest) -> HeartbeatReply:
        c = self._coordinator
        member = self._member(request.header)
        stats = read_stats(request.stats)
        if len(request.losses) > MAX_LOSSES:
            raise InvalidArgument(f"more than {MAX_LOSSES} losses are counted")
        with c.lock:
            self._still(member)
            # One sent in the time of an earlier coordinator may have been on its way for long.
            if member.role == "worker" and not request.asking and request.header.term == c.term:
                self._hear(member, request)
            elif member.role == "worker":
                # Its question may have been put together before it was told so.
                c.clocks.told(member.incarnation, request.clock.heard)
            if request.stats:
                member.stats, member.told = stats, c.clock()
            c.losses.heard(member.incarnation, request.losses)
            return HeartbeatReply(
                term=c.term,
                generation=c.generation if c.placed else 0,
                phase=c.phase,
                step=c.work.steps,
                minimum=c.clocks.minimum,
                opened=c.cuts.opened,
                gate=c.cuts.gate.cut if c.cuts.gate is not None and self._stands(member) else 0,
                gate_seconds=c.cuts.seconds_to_gate(),
                committed=c.cuts.committed,
                leave=member.role == "shard" and c.scaling.dismissed(member),
                lost=c.losses.questions(member.incarnation),
            )

    def _stands(self, member: Member) -> bool:
        """Whether a member has to stand at gates: under hybrid it is the shards that hold back what comes after a cut."""
        return member.role == "worker" and self._coordinator.spec.mode != "hybrid"

    def _hear(self, member: Member, request: HeartbeatRequest | LeaseRequest) -> set[tuple[str, int]]:
        """Take in a worker's clock and return the splits that it holds."""
        if len(request.held) + len(request.evaluations) > MAX_SPLITS:
            raise InvalidArgument(f"more than {MAX_SPLITS} splits are held")
        c, clock = self._coordinator, request.clock
        held = {("train", s) for s in request.held} | {("evaluate", s) for s in request.evaluations}
        held |= read_ranks(c.spec.ranks, list(request.ranks))
        if clock.active and clock.heard > clock.acknowledged:
            raise Malformed(
                f"a clock of {clock.acknowledged} groups is below the minimum of {clock.heard} that it was told"
            )
        if member.incarnation in c.clocks.unheard or isinstance(request, LeaseRequest):
            # Heartbeats may be late; what an earlier life of this coordinator leased is known from them all the same.
            c.work.claim(member.incarnation, held)
        c.clocks.heard(member.incarnation, active=clock.active, acknowledged=clock.acknowledged, minimum=clock.heard)
        return held

    def placement(self, request: PlacementRequest) -> Placement:
        self._member(request.header)
        return self._coordinator.placement(0 if request.whole else request.header.generation)

    def lease(self, request: LeaseRequest) -> LeaseReply:
        c = self._coordinator
        member = self._member(request.header, "worker")
        if not 1 <= request.wanted <= MAX_SPLITS:
            raise InvalidArgument(f"{request.wanted} splits wanted: ask for 1 to {MAX_SPLITS}")
        if request.header.term != c.term:
            # It says what was held before this coordinator's life, and may have been on its way for long.
            raise Unavailable(f"the question is of term {request.header.term}, this coordinator is of term {c.term}")
        with c.lock:
            self._still(member)
            if request.number < member.asked:
                raise Unavailable(f"question {request.number} came after question {member.asked}")
            if request.number > member.asked or member.answer is None:
                held = self._hear(member, request)
                member.asked, member.answer = request.number, self._answer(member, request, held)
            reply: LeaseReply = member.answer
            return reply

    def _answer(self, member: Member, request: LeaseRequest, held: set[tuple[str, int]]) -> LeaseReply:
        """Lease what there is to lease. Splits that the worker was given and does not hold never reached it: they are free."""
        c = self._coordinator
        c.work.keep_only(member.incarnation, held)
        if not request.clock.active:
            c.clocks.idle(member.incarnation)
        reply = LeaseReply(work=WAIT, retry_seconds=c.spec.heartbeat_seconds / 10, opened=c.cuts.opened)
        if c.phase in (STOPPING, *OVER) or member.incarnation in c.scaling.leaves:
            reply.work = FINISHED
        elif c.phase == TRAINING and not c.clocks.unheard and not c.cuts.withholds:
            grant = c.work.grant(member.incarnation, request.wanted)
            reply.work = _WORK[grant.kind]
            if grant.kind == "train" and c.spec.ranks:
                reply.ranks.extend(grant.splits)
                reply.epoch = c.work.epoch
                return reply
            reply.splits.extend(grant.splits)
            reply.fresh.extend(grant.fresh)
            if grant.kind == "train":
                if c.cuts.gate is not None:
                    # It hears of it now: the next heartbeat may come too late.
                    c.cuts.gate.wait_for(member.incarnation)
                    reply.gate, reply.gate_seconds = c.cuts.gate.cut, c.cuts.seconds_to_gate()
                reply.minimum = c.clocks.activate(member.incarnation)
                # It counts on from where it was: a heartbeat of its earlier splits, come late, claims no more than is done.
                acknowledged = request.clock.acknowledged
                c.clocks.heard(member.incarnation, active=True, acknowledged=acknowledged, minimum=0)
        return reply

    def gate(self, request: GateRequest) -> GateReply:
        c = self._coordinator
        member = self._member(request.header, "worker")
        with c.lock:
            if c.cuts.gate is not None and c.cuts.gate.cut == request.cut:
                c.cuts.gate.come(member.incarnation)
            return GateReply(opened=c.cuts.opened)

    def close_split(self, request: CloseSplitRequest) -> Empty:
        c = self._coordinator
        member = self._member(request.header, "worker")
        if request.work == TRAIN:
            close_split(c, member.incarnation, request.split, request.samples, request.loss_sum, request.groups)
        elif request.work == EVALUATE:
            found = check(request.split, request.sums, request.scores, c.spec.metrics, max(1, c.spec.evaluation_splits))
            evaluated(c, member.incarnation, request.split, found)
        else:
            raise Malformed("a split that is closed is one of TRAIN or EVALUATE")
        return Empty()

    def release(self, request: ReleaseRequest) -> Empty:
        c = self._coordinator
        member = self._member(request.header, "worker")
        if len(request.splits) + len(request.evaluations) > MAX_SPLITS:
            raise InvalidArgument(f"more than {MAX_SPLITS} splits given back in one message")
        for kind, splits in (("train", request.splits), ("evaluate", request.evaluations)):
            for split in splits:
                release(c, member.incarnation, kind, split, request.reason[:2048])
        return Empty()

    def leave(self, request: LeaveRequest) -> Empty:
        member = self._member(request.header)
        error = request.error[:2048]
        self._coordinator.member_gone(member, "dead" if error else "left", error)
        return Empty()

    def report(self, request: ReportRequest) -> ReportReply:
        c = self._coordinator
        member = self._member(request.header, "shard")
        with c.lock:
            self._still(member)
            return report(c, member, request)

    def scale(self, request: ScaleRequest) -> ScaleReply:
        c = self._coordinator
        with c.lock:
            said = scale(c, request.servers, request.workers)
            return ScaleReply(servers=c.scaling.servers, workers=c.scaling.workers, said=said)

    def status(self, request: StatusRequest) -> StatusReply:
        return StatusReply(status=json.dumps(self.newest.status()))

    def describe(self, request: DescribeRequest) -> DescribeReply:
        c = self._coordinator
        with c.lock:
            return DescribeReply(
                job=c.spec.job_bytes, run=c.run, spec=c.spec_json, placement=c.placement(), step=c.work.steps
            )

    def checkpoint(self, request: CheckpointRequest) -> CheckpointReply:
        c = self._coordinator
        with c.lock:
            if c.phase not in (TRAINING, WRITING):
                raise InvalidArgument(f"job {c.spec.name} is {c.phase}: a cut is made of a job that trains")
            c.cuts.wanted = True
            return CheckpointReply(last=c.cuts.last)

    def live_digest(self, request: LiveDigestRequest) -> LiveDigestReply:
        c = self._coordinator
        with c.lock:
            if c.phase not in (TRAINING, WRITING):
                raise InvalidArgument(f"job {c.spec.name} is {c.phase}: its last checkpoint has all that it holds")
            c.live_digest.wanted = True
            return LiveDigestReply(last=c.cuts.last)

    def rollback(self, request: RollbackRequest) -> RollbackReply:
        return RollbackReply(number=self._coordinator.rollbacks.ask(request.table, request.path))

    def stop(self, request: StopRequest) -> Empty:
        self._coordinator.stop(request.checkpoint, request.reason[:2048])
        return Empty()
