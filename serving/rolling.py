# SPDX-License-Identifier: Apache-2.0
"""All servers of a model told to serve one cut, each by itself and all at the same time.

    asked first      what each has: all of them have to answer, and to have the cut
    told then        that cut by its number, so that who tells them again tells the same

Invariant: nobody is told anything unless all can do it, as far as they say. While some have done it and others not, a client of
all parts has answers of one cut, as whenever cuts change. Whoever fails in between is named; the others have done it.
"""

import asyncio
from collections.abc import Generator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from oarlock.proto.errors import InvalidArgument, NotFound, PSError
from oarlock.proto.methods import PROTOCOL
from oarlock.proto.rpc import BlockingTransport, GrpcTransport
from oarlock.proto.serving_pb2 import ModelReply, ModelRequest, ServeCutRequest
from oarlock.serving.fleet import ServedModel, differs, read_model
from oarlock.serving.gather import merged

Answers = Mapping[str, Any]
Steps = Generator[tuple[str, Any], Answers, ModelReply]

# Servers that are told at once.
MOST_AT_ONCE = 64


def rolling_back(cut: int, *, newest: bool) -> Steps:
    """Yield (method, request) for all servers, take what each answers, a reply or a PSError; return what they serve then."""
    told = yield "Serving.Describe", ModelRequest(protocol=PROTOCOL)
    _refuse_failures(told, "no server was told anything: {address} does not say what it has: {error}")
    model = _one_model(told)
    if not newest:
        cut = common_cut(told, cut)
    done = yield "Serving.Rollback", ServeCutRequest(protocol=PROTOCOL, cut=cut, newest=newest)
    what = "the newest cut" if newest else f"cut {cut}"
    _refuse_failures(
        done, f"{{done}} of {len(done)} servers serve {what}, {{address}} does not: {{error}}; ask again for {what}"
    )
    return merged(model, list({reply.part: reply for reply in done.values()}.values()))


def common_cut(told: Mapping[str, ModelReply], cut: int) -> int:
    """Return the cut that all servers go to: ``cut``, or for 0 the newest that all have and that is older than what any serves.

    NotFound names who does not have it.
    """
    if cut:
        for address, reply in told.items():
            if cut not in reply.cuts:
                raise NotFound(f"{address} has no cut {cut}: no server was told anything", cut=cut)
        return cut
    served = min(reply.version.cut for reply in told.values())
    common = set.intersection(*(set(reply.cuts) for reply in told.values()))
    if older := [each for each in common if each < served]:
        return int(max(older))
    raise NotFound(f"no cut that all {len(told)} servers have is older than {served}, which is served", cut=served)


def _one_model(told: Mapping[str, ModelReply]) -> ServedModel:
    """Return what all servers serve together; InvalidArgument names one that does not belong to the first."""
    found = {address: read_model(reply)[0] for address, reply in told.items()}
    first, model = next(iter(found.items()))
    for address, other in found.items():
        if wrong := differs(other, model):
            raise InvalidArgument(f"{address} and {first} do not go together: {address} {wrong}")
    have = {reply.part for reply in told.values()}
    if lacking := [part for part in range(model.parts) if part not in have]:
        raise InvalidArgument(
            f"none of {len(told)} servers has part {lacking[0]} of {model.parts}: give the addresses of all parts, or "
            "they serve several cuts"
        )
    return model


def _refuse_failures(answers: Answers, words: str) -> None:
    """Raise the first failure, said in ``words``."""
    failed = {address: error for address, error in answers.items() if isinstance(error, PSError)}
    for address, error in failed.items():
        text = words.format(address=address, error=error, done=len(answers) - len(failed))
        raise type(error)(text, **error.details)


def roll_back(
    transport: BlockingTransport, addresses: Sequence[str], steps: Steps, timeout_seconds: float
) -> ModelReply:
    """Carry out ``steps`` from this thread, with one thread for each server meanwhile."""

    def ask(address: str, method: str, request: Any) -> Any:
        try:
            return transport.call(address, method, request, timeout_seconds=timeout_seconds)
        except PSError as error:
            return error

    try:
        method, request = next(steps)
        with ThreadPoolExecutor(min(MOST_AT_ONCE, len(addresses)), thread_name_prefix="oarlock-rollback") as pool:
            while True:
                asked = {each: pool.submit(ask, each, method, request) for each in addresses}
                method, request = steps.send({address: answer.result() for address, answer in asked.items()})
    except StopIteration as done:
        found: ModelReply = done.value
        return found


async def roll_back_async(
    transport: GrpcTransport, addresses: Sequence[str], steps: Steps, timeout_seconds: float
) -> ModelReply:
    """Carry out ``steps`` on an event loop."""

    async def ask(address: str, method: str, request: Any) -> Any:
        try:
            return await transport.call(address, method, request, timeout_seconds=timeout_seconds)
        except PSError as error:
            return error

    try:
        method, request = next(steps)
        while True:
            answers = await asyncio.gather(*(ask(each, method, request) for each in addresses))
            method, request = steps.send(dict(zip(addresses, answers, strict=True)))
    except StopIteration as done:
        found: ModelReply = done.value
        return found
