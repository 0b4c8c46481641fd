# SPDX-License-Identifier: Apache-2.0
"""A server as jobs run it, under crowds: a thousand connections, hundreds of streams, answers by the gigabyte that nobody reads.

What is measured is memory of the whole process, so bounds are wide; without what they test these would be gigabytes.
"""

import contextlib
import gc
import resource
import socket

import h2
import numpy as np
import ports
import pytest
import rig

from oarlock.embedding.spec import DenseSpec
from oarlock.proto.arrays import pack
from oarlock.proto.shard_pb2 import PullRequest

pytestmark = pytest.mark.slow

STREAM, SINGLE = "/oarlock.Shard/PullStream", "/oarlock.Shard/Marks"
MIB = 1 << 20


@pytest.fixture(autouse=True)
def many_files():
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard < 4096:
        pytest.skip("this machine lets a process have no 4096 files")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 4096), hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def held(stack, address, connections, **options):
    made = [h2.Connection(address, **options) for _ in range(connections)]
    for one in made:
        stack.callback(one.close)
    return made


def test_a_thousand_idle_connections_and_hundreds_of_idle_calls():
    port = ports.Port()
    try:
        assert port.trains(20)
        before = ports.resident()
        with contextlib.ExitStack() as stack:
            host, number = port.address.split(":")
            for _ in range(1000):
                stack.enter_context(socket.create_connection((host, int(number)), timeout=20))
            assert port.trains(10)
            for one in held(stack, port.address, 10):
                for _ in range(30):
                    one.call(STREAM)
                one.settled()
            assert port.trains(10)
            for one in held(stack, port.address, 10):
                for _ in range(30):
                    one.call(SINGLE, h2.message(b"x", length=1000))
                one.settled()
            assert port.trains(10)
            grown = ports.resident() - before
            print(f"1000 connections, 300 streams, 300 half calls: {grown / MIB:.0f} MiB")
            assert grown < 200 * MIB
        assert port.trains(10)
    finally:
        port.stop()


def test_a_thousand_streams_of_one_connection():
    """More of them than a connection may have are refused one by one; the connection lives."""
    port = ports.Port()
    try:
        with contextlib.ExitStack() as stack:
            (one,) = held(stack, port.address, 1)
            for _ in range(1000):
                one.call(STREAM)
            assert port.trains(10)
            one.settled()
    finally:
        port.stop()


VALUES = 1 << 19


@pytest.fixture
def large():
    """A shard whose dense values are 2 MiB."""
    made = ports.Port(
        threads=64, stall_seconds=0.1, dense=(DenseSpec("w", (VALUES,), rig.SGD, rig.ZEROS, slice=1 << 16),)
    )
    yield made
    made.stop()
    gc.collect()


def pull_of(port):
    numbers = np.arange(port.job.layout.dense_base, port.job.layout.blocks, dtype=np.int32)
    return h2.message(PullRequest(header=port.job.header(0), dense=pack(numbers)).SerializeToString())


def test_a_stream_of_pulls_whose_answers_nobody_reads(large):
    """A thousand of them would be 2 GiB; the server answers one and waits."""
    assert large.trains(2)
    before = ports.resident()
    with contextlib.ExitStack() as stack:
        (one,) = held(stack, large.address, 1, window=0)
        # No more than the server's own window lets in.
        one.call(STREAM, pull_of(large) * (60_000 // len(pull_of(large))))
        one.settled()
        assert large.trains(3)
        grown = ports.resident() - before
        print(f"a stream that nobody reads: {grown / MIB:.0f} MiB")
        assert grown < 100 * MIB


def test_single_pulls_whose_answers_nobody_reads(large):
    """Six hundred of them, 1.2 GiB: no more is held than the places for single calls, 12 times 2 MiB, and what gRPC adds."""
    assert large.trains(2)
    before = ports.resident()
    peak = 0
    with contextlib.ExitStack() as stack:
        for one in held(stack, large.address, 6, window=0):
            for _ in range(100):
                one.call("/oarlock.Shard/Pull", pull_of(large), end=True)
            one.settled()
            assert large.trains(2)
            peak = max(peak, ports.resident() - before)
    print(f"600 answers that nobody reads: {peak / MIB:.0f} MiB at most")
    assert peak < 300 * MIB
