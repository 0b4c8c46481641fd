# SPDX-License-Identifier: Apache-2.0
"""``docs/wire.md`` is true: its bytes are those of a real pull and push, its tables those of the code."""

import asyncio
import random
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message

from oarlock.client.client import Client
from oarlock.client.job import JobSpec
from oarlock.client.layout import Layout
from oarlock.client.membership import Membership
from oarlock.client.push import RowGradients
from oarlock.client.router import ShardAddress, make_routes, pack_placement
from oarlock.embedding.hashing import table_salt
from oarlock.embedding.keys import KeySet, KeySorter
from oarlock.embedding.spec import DenseSpec, Initializer, OptimizerSpec, TableSpec
from oarlock.proto import common_pb2, shard_pb2
from oarlock.proto.arrays import unpack
from oarlock.proto.common_pb2 import DType, Header
from oarlock.proto.coordinator_pb2 import WORKER, JoinReply, JoinRequest
from oarlock.proto.methods import METHODS, PROTOCOL
from oarlock.proto.shard_pb2 import AdoptRequest, PullRequest
from oarlock.proto.transport import InProcess
from oarlock.ps.identity import Identity
from oarlock.ps.service import ShardService

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "docs" / "wire.md").read_text(encoding="utf-8")

# The job of the example.
SGD = OptimizerSpec("sgd")
SPEC = JobSpec(
    job=bytes(range(16)).hex(),
    name="example",
    seed=1,
    recipe="none:none",
    tables=(TableSpec("user", 2, SGD, Initializer("constant", mean=0.5), blocks=2),),
    dense=(DenseSpec("bias", (1,), SGD),),
    files=(),
    evaluation_files=(),
    splits=1000,
    evaluation_splits=0,
    rows_per_split=100,
    evaluation_rows_per_split=1,
    batch_rows=10,
    epochs=1,
    servers=1,
    workers=1,
    metrics=("auc",),
)
SHARD_0 = ShardAddress(0, "shard-0", 4)
WORKER_0 = 3
RAW = np.array([7, 4, 7, 9], np.uint64)
EXAMPLE = ["Shard.Pull", "Shard.Pull", "Shard.Push", "Shard.Push"]


class Recorder(InProcess):
    """Delivers what was written and read back, and keeps the bytes of both directions."""

    def __init__(self) -> None:
        super().__init__()
        self.messages: list[tuple[str, bytes]] = []

    async def call(self, address: str, method: str, request: Message, *, timeout_seconds: float) -> Any:
        sent = request.SerializeToString()
        got = METHODS[method].request.FromString(sent)
        reply = await super().call(address, method, got, timeout_seconds=timeout_seconds)
        back: bytes = reply.SerializeToString()
        if method in EXAMPLE:
            self.messages += [(method, sent), (method, back)]
        return METHODS[method].reply.FromString(back)


class Joining:
    """Answers Join as the example's coordinator."""

    def join(self, request: JoinRequest) -> JoinReply:
        routes = pack_placement(1, np.zeros(3, np.int32), {0: SHARD_0})
        return JoinReply(job=SPEC.job_bytes, run=1, incarnation=WORKER_0, spec=SPEC.to_json(), placement=routes)


def grouped() -> KeySet:
    layout = Layout(SPEC.tables, SPEC.dense)
    ranks = make_routes(layout, 1, np.zeros(3, np.int32), {0: SHARD_0}).ranks
    return KeySorter().build(RAW, table_salt("user"), 1, ranks[0])


@cache
def recorded() -> list[tuple[str, bytes]]:
    """Return (method, bytes) of a pull, its reply, a push and its reply, as a client and a shard exchange them."""
    wire, service = Recorder(), ShardService()
    service.configure(SPEC, Identity(SPEC.job_bytes, 1, 0, SHARD_0.incarnation))
    wire.serve(service, SHARD_0.address)
    wire.serve(Joining(), "coordinator")
    member = Membership(wire, "coordinator", WORKER, rng=random.Random(0))

    async def body() -> None:
        await member.join()
        adopt = AdoptRequest(
            header=Header(protocol=PROTOCOL, job=SPEC.job_bytes, run=1, target=SHARD_0.incarnation, term=1),
            placement=pack_placement(1, np.zeros(3, np.int32), {0: SHARD_0}),
        )
        await wire.call(SHARD_0.address, "Shard.Adopt", adopt, timeout_seconds=1)
        client, keys = Client(member), grouped()
        rows, dense = np.empty((3, 2), np.float32), np.empty(1, np.float32)
        await client.pull({"user": keys}, {"user": rows}, dense=dense)
        gradients = np.array([[1, 0], [0, 2], [-1, 0]], np.float32)
        await client.push(
            300, 5, {"user": RowGradients(keys, gradients, 0.25)}, dense=np.array([4], np.float32), dense_rate=0.5
        )

    asyncio.run(body())
    return wire.messages


# What bytes say


def varint(data: bytes, at: int) -> tuple[int, int]:
    """Return (value, position behind it)."""
    value = shift = 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 127) << shift
        shift += 7
        if byte < 128:
            return value, at


def fields(
    kind: Descriptor, data: bytes, at: int, end: int, path: str = ""
) -> Iterator[tuple[int, int, FieldDescriptor, str, str]]:
    """Yield (begin, end, field, path, meaning) of all fields; that of a message ends where its own fields begin."""
    dtype = common_pb2.Array.FromString(data[at:end]).dtype if kind.name == "Array" else None
    while at < end:
        begin = at
        tag, at = varint(data, at)
        field = kind.fields_by_number[tag >> 3]
        name = f"{path}{field.name}"
        if tag & 7 == 0:
            value, at = varint(data, at)
            known = field.enum_type.values_by_number[value].name if field.enum_type else value
            yield begin, at, field, name, str(known)
        elif tag & 7 == 1:
            at += 8
            yield begin, at, field, name, str(float(np.frombuffer(data[at - 8 : at], "<f8")[0]))
        else:
            size, at = varint(data, at)
            stop = at + size
            if field.message_type is not None:
                yield begin, at, field, name, f"{size} bytes"
                yield from fields(field.message_type, data, at, stop, f"{name}.")
            elif dtype is not None and field.name == "data":
                form = {DType.UINT64: "<u8", DType.INT32: "<i4", DType.FLOAT32: "<f4"}[DType.ValueType(dtype)]
                yield begin, stop, field, name, ", ".join(map(str, np.frombuffer(data[at:stop], form).tolist()))
            elif field.type == FieldDescriptor.TYPE_BYTES:
                yield begin, stop, field, name, f"{size} bytes"
            else:
                values = []
                while at < stop:
                    value, at = varint(data, at)
                    values.append(value)
                yield begin, stop, field, name, str(values)
            at = stop


def example(number: int) -> list[tuple[int, bytes, str, str]]:
    """Return (offset, bytes, field, meaning) of each line of the page's n-th block of bytes."""
    block = re.findall(r"^```hex\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)[number]
    lines = [re.split(r"  +", line.strip(), maxsplit=3) for line in block.splitlines()]
    return [(int(at), bytes.fromhex(data), field, meaning) for at, data, field, meaning in lines]


def grouped_hex(data: bytes, width: int) -> str:
    """Return a field's bytes as the page writes them: tag, length and values apart."""
    _, behind = varint(data, 0)
    parts = [data[:behind]]
    if data[0] & 7 == 2:
        _, start = varint(data, behind)
        parts.append(data[behind:start])
        parts += [data[i : i + width] for i in range(start, len(data), width)]
    else:
        parts.append(data[behind:])
    return " ".join(part.hex() for part in parts)


@pytest.mark.parametrize("number", range(len(EXAMPLE)))
def test_the_example_is_what_a_client_and_a_shard_exchange(number: int) -> None:
    assert TEXT.count("```hex") == len(EXAMPLE)
    method, data = recorded()[number]
    assert method == EXAMPLE[number]
    kind = METHODS[method].reply if number % 2 else METHODS[method].request
    found = [(begin, data[begin:end], name, meaning) for begin, end, _, name, meaning in fields_of(kind, data)]
    # Behind a semicolon stands what a reader may want to know besides.
    lines = [(at, part, name, meaning.split(";")[0]) for at, part, name, meaning in example(number)]
    if lines != found:
        widths = [
            8 if name.endswith("keys.data") else 4 if name.endswith(".data") else 1 << 30 for _, _, name, _ in found
        ]
        now = [(at, grouped_hex(p, w), name, m) for (at, p, name, m), w in zip(found, widths, strict=True)]
        wide = max(len(data) for _, data, _, _ in now)
        long = max(len(name) for _, _, name, _ in now)
        should = "\n".join(f"{at:3}  {part:{wide}}  {name:{long}}  {m}" for at, part, name, m in now)
        pytest.fail(f"block {number} of docs/wire.md is not what is sent, which is (less the remarks):\n{should}")
    assert kind.FromString(data).SerializeToString(deterministic=True) == data


def fields_of(kind: type[Message], data: bytes) -> Iterator[tuple[int, int, FieldDescriptor, str, str]]:
    return fields(kind.DESCRIPTOR, data, 0, len(data))


def shard() -> ShardService:
    """Return the example's shard, with all blocks, as yet untrained."""
    service = ShardService()
    service.configure(SPEC, Identity(SPEC.job_bytes, 1, 0, SHARD_0.incarnation))
    placement = pack_placement(1, np.zeros(3, np.int32), {0: SHARD_0})
    service.adopt(AdoptRequest(header=header(), placement=placement))
    return service


def header(**changes: Any) -> Header:
    values = {"protocol": PROTOCOL, "job": SPEC.job_bytes, "run": 1, "target": SHARD_0.incarnation, "term": 1}
    return Header(**{**values, **changes})


def test_a_shard_answers_the_pages_bytes_with_the_pages_bytes() -> None:
    service = shard()
    pull, pulled, push, pushed = (b"".join(line[1] for line in example(n)) for n in range(4))
    assert service.pull(PullRequest.FromString(pull)).SerializeToString().hex() == pulled.hex()
    assert service.push(shard_pb2.PushRequest.FromString(push)).SerializeToString().hex() == pushed.hex()
    again = service.push(shard_pb2.PushRequest.FromString(push))
    assert (again.applied, again.skipped) == (0, 3)
    assert "answered by `skipped` = 3" in TEXT
    after = service.pull(PullRequest.FromString(pull))
    # 0.5 less rate times gradient; bias 0 less 0.5 * 4
    assert unpack(after.rows[0], np.float32, "rows", dims=2).tolist() == [[0.25, 0.5], [0.5, 0.0], [0.75, 0.5]]
    assert unpack(after.dense, np.float32, "dense").tolist() == [-2.0]


def test_the_examples_keys_are_those_of_the_text() -> None:
    assert f"raw keys {', '.join(map(str, RAW.tolist()))}." in TEXT
    request = PullRequest.FromString(b"".join(line[1] for line in example(0)))
    keys = request.tables[0]
    found = [unpack(keys.keys, np.uint64, "k"), unpack(keys.blocks, np.int32, "b"), unpack(keys.counts, np.int32, "c")]
    assert [f.tolist() for f in found] == [[4, 7, 9], [0, 1], [1, 2]]
