# SPDX-License-Identifier: Apache-2.0
"""Error feedback: nothing that compression leaves out is forgotten, but for what is counted; memory has an end."""

from fractions import Fraction

import compress_reference as twin
import embedding_reference as reference
import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

from oarlock.embedding.compress import Compression, Draw, RowCodec, draw_start
from oarlock.embedding.compress_residuals import Residuals
from oarlock.embedding.refusal import GRADIENT_LIMIT
from oarlock.proto.errors import InvalidArgument, Malformed, OutOfMemory

EXAMPLES = settings(max_examples=60 if reference.JIT else 6)
DIM = 6
START = draw_start(0, "user", "push")
NEAREST = [Compression("float16"), Compression("bfloat16"), Compression("int8"), Compression("topk", 2)]
STOCHASTIC = [Compression(c, rounding="stochastic") for c in ("float16", "bfloat16", "int8")]
LOSSLESS = [Compression(), Compression("topk", DIM)]
EVERY = [*NEAREST, *STOCHASTIC, *LOSSLESS]
SLOT = 4 * DIM + 32


def name_of(compression):
    return f"{compression.codec}{compression.k or ''}-{compression.rounding}"


def send(residuals, keys, gradients, step=0):
    """Return a payload and what is read from it."""
    codec = residuals.codec
    keys = np.asarray(keys, np.uint64)
    out = np.full(codec.size(len(keys)) + 4, 0xA5, np.uint8)
    size = residuals.encode(keys, np.asarray(gradients, np.float32), out[:-4], Draw(keys, START, step))
    assert (out[-4:] == 0xA5).all()
    back = np.empty((len(keys), codec.dim), np.float32)
    codec.decode(out[:size], back)
    return out[:size].tobytes(), back


def exact(row):
    return np.array([Fraction(float(value)) for value in row])


class Sums:
    """What was given and sent for each key, in fractions, and how much rounding may have taken."""

    def __init__(self):
        self.zero = exact(np.zeros(DIM))
        self.given, self.sent, self.slack = {}, {}, {}

    def add(self, keys, gradients, sent):
        for key, gradient, row in zip(keys, gradients, sent, strict=True):
            self.given[key] = self.given.get(key, self.zero) + exact(gradient)
            self.sent[key] = self.sent.get(key, self.zero) + exact(row)
            # one rounding of gradient + kept, and one of total - sent where that is not exact
            size = abs(exact(gradient)) + abs(exact(row)) + abs(self.given[key] - self.sent[key])
            self.slack[key] = self.slack.get(key, self.zero) + 2 * size * Fraction(2) ** -24 + Fraction(2) ** -149


@pytest.mark.parametrize("compression", EVERY, ids=name_of)
def test_what_was_sent_and_what_is_kept_add_up_to_what_was_given(compression):
    rng = np.random.default_rng(1)
    residuals = Residuals(RowCodec(compression, DIM, GRADIENT_LIMIT), 1 << 16)
    sums = Sums()
    for step in range(40 if reference.JIT else 5):
        keys = rng.permutation(12)[:7]
        gradients = (rng.normal(size=(7, DIM)) * np.exp2(rng.uniform(-30, 20, (7, 1)))).astype(np.float32)
        sums.add(keys.tolist(), gradients, send(residuals, keys, gradients, step)[1])
    keys, kept = residuals.drain()
    assert sorted(keys.tolist()) == sorted(sums.given)
    for key, row in zip(keys.tolist(), kept, strict=True):
        off = abs(sums.given[key] - sums.sent[key] - exact(row))
        assert (off <= sums.slack[key]).all()
    assert kept.any() == (compression not in LOSSLESS)


@pytest.mark.parametrize("compression", [*(c for c in NEAREST if c.codec != "int8"), *LOSSLESS], ids=name_of)
def test_to_the_bit_where_sums_are_exact(compression):
    """Gradients are multiples of 2^-6 below 2^9, and so is all that these codecs make of them and leave out."""
    rng = np.random.default_rng(2)
    residuals = Residuals(RowCodec(compression, DIM, GRADIENT_LIMIT), 1 << 16)
    rest = np.zeros((9, DIM))
    for step in range(30 if reference.JIT else 4):
        gradients = (rng.integers(-(1 << 15), 1 << 15, (9, DIM)) / 64).astype(np.float32)
        _, sent = send(residuals, range(9), gradients, step)
        rest += gradients.astype(np.float64) - sent
    assert residuals.drain()[1].tobytes() == rest.astype(np.float32).tobytes()
    assert rest.any() == (compression not in LOSSLESS)


@EXAMPLES
@given(
    row=st.lists(st.floats(-(2.0**49), 2.0**49, width=32), min_size=DIM, max_size=DIM),
    compression=st.sampled_from(NEAREST),
)
def test_to_nearest_what_is_left_out_is_kept_exactly(row, compression):
    gradient = np.array([row], np.float32)
    if compression.codec == "float16":  # beyond twice what it can say, the difference has too many digits
        gradient = np.clip(gradient, -131008, 131008)
    residuals = Residuals(RowCodec(compression, DIM, GRADIENT_LIMIT), 1 << 16)
    _, sent = send(residuals, [1], gradient)
    assert (exact(sent[0]) + exact(residuals.drain()[1][0]) == exact(gradient[0])).all()


def test_a_small_gradient_arrives_in_the_end():
    """Without error feedback it would be rounded off for ever."""
    gradient = np.array([[1, 1e-3, 0, 0, 0, 0]], np.float32)
    for compression in (Compression("int8"), Compression("topk", 1)):
        codec = RowCodec(compression, DIM)
        out = np.empty(codec.size(1), np.uint8)
        codec.encode(gradient, out)
        back = np.empty_like(gradient)
        codec.decode(out, back)
        assert back[0, 1] == 0
        if compression.codec == "int8":
            residuals = Residuals(codec, 1 << 10)
            total = sum(send(residuals, [5], gradient)[1].astype(np.float64) for _ in range(100))
            assert abs(total[0, 1] - 0.1) <= 0.5 / 127 + 1e-6
        else:
            residuals = Residuals(codec, 1 << 10)
            send(residuals, [5], gradient)
            _, back = send(residuals, [5], np.zeros((1, DIM)))
            assert back[0].tolist() == [0, np.float32(1e-3), 0, 0, 0, 0]


@EXAMPLES
@given(data=st.data())
def test_follows_the_twin_to_the_bit(data):
    compression = data.draw(st.sampled_from(EVERY))
    room = data.draw(st.integers(1, 9))
    limit = data.draw(st.sampled_from([GRADIENT_LIMIT, 4.0]))
    residuals = Residuals(RowCodec(compression, DIM, limit), room * SLOT)
    assert residuals.room == room
    model = twin.Residuals(compression, DIM, room, limit)
    rng = np.random.default_rng(data.draw(st.integers(0, 1 << 32)))
    for step in range(data.draw(st.integers(1, 8))):
        keys = rng.integers(0, 14, rng.integers(0, 12)).astype(np.uint64) * np.uint64(0x1234567890ABCDEF)
        gradients = rng.normal(size=(len(keys), DIM)).astype(np.float32)
        bad = rng.random(gradients.shape) < 0.02
        gradients[bad] = rng.choice(np.array([np.nan, np.inf, 5, 1e15], np.float32), bad.sum())
        payload, _ = send(residuals, keys, gradients, step)
        assert payload == model.encode(keys, gradients, int(START), step)
        assert residuals.stats() == {"keys": len(model.kept), "room": room} | model.counts
    keys, kept = residuals.drain()
    assert keys.tolist() == list(model.kept)
    assert kept.tobytes() == b"".join(row.tobytes() for row in model.kept.values())
    assert residuals.stats()["keys"] == 0
    assert len(residuals.drain()[0]) == 0


def test_many_keys_come_and_go():
    """As the index is filled, and emptied by what gives way, no key is lost from sight."""
    rng = np.random.default_rng(4)
    room = 500 if reference.JIT else 20
    residuals = Residuals(RowCodec(Compression("topk", 1), DIM), room * SLOT)
    model = twin.Residuals(Compression("topk", 1), DIM, room, float("inf"))
    for _ in range(20):
        keys = rng.zipf(1.2, 3 * room // 2).astype(np.uint64) % np.uint64(4 * room)
        gradients = rng.normal(size=(len(keys), DIM)).astype(np.float32)
        assert send(residuals, keys, gradients)[0] == model.encode(keys, gradients)
    assert residuals.drain()[0].tolist() == list(model.kept)
    assert residuals.stats()["lost"] == model.counts["lost"] > room


def test_the_key_used_least_recently_gives_way():
    residuals = Residuals(RowCodec(Compression("topk", 1), DIM), 3 * SLOT)
    gradient = np.arange(1, DIM + 1, dtype=np.float32)[None]
    for key in (1, 2, 3, 1, 4):
        send(residuals, [key], gradient)
    assert residuals.stats() == {"keys": 3, "room": 3, "lost": 1, "dropped": 0, "refused": 0}
    assert residuals.drain()[0].tolist() == [3, 1, 4]


def test_a_refused_gradient_leaves_what_is_kept():
    residuals = Residuals(RowCodec(Compression("int8"), DIM, 100.0), 1 << 12)
    gradient = np.array([[1, 0.3, 0.2, 0.1, 0, 0]], np.float32)
    _, first = send(residuals, [7], gradient)
    for bad in (np.nan, np.inf, 100.0, -1e20):
        _, sent = send(residuals, [7], np.array([[bad, 0, 0, 0, 0, 0]]))
        assert np.isnan(sent).all()
    assert residuals.stats()["refused"] == 4
    assert residuals.drain()[1].tobytes() == (gradient - first).tobytes()


def test_what_would_make_a_gradient_refused_is_dropped():
    residuals = Residuals(RowCodec(Compression("topk", 1), DIM, 100.0), 1 << 12)
    gradient = np.array([[90, 80, 0, 0, 0, 0]], np.float32)
    send(residuals, [7], gradient)  # keeps 80
    _, sent = send(residuals, [7], gradient)
    assert sent[0].tolist() == [90, 0, 0, 0, 0, 0]
    assert residuals.stats()["dropped"] == 1
    assert residuals.drain()[1][0].tolist() == [0, 80, 0, 0, 0, 0]


def test_float16_sends_the_rest_of_what_was_too_large_for_it():
    residuals = Residuals(RowCodec(Compression("float16"), DIM, GRADIENT_LIMIT), 1 << 12)
    _, first = send(residuals, [7], np.full((1, DIM), 100000))
    _, second = send(residuals, [7], np.zeros((1, DIM)))
    assert first[0, 0] == 65504
    assert abs(first[0, 0] + second[0, 0] - 100000) <= 16


def test_a_new_split_begins_at_zero():
    residuals = Residuals(RowCodec(Compression("int8", rounding="stochastic"), DIM), 1 << 12)
    gradient = np.random.default_rng(0).normal(size=(5, DIM)).astype(np.float32)
    payloads = []
    for _ in range(2):
        payloads.append([send(residuals, range(5), gradient, step)[0] for step in range(3)])
        assert residuals.stats()["keys"] == 5
        residuals.clear()
        assert residuals.stats()["keys"] == 0
    assert payloads[0] == payloads[1]
    assert len(set(payloads[0])) == 3


def test_with_zstd_nothing_else_changes():
    plain, packed = (Residuals(RowCodec(Compression("topk", 1, zstd=z), DIM), 1 << 16) for z in (0, 1))
    gradients = np.tile(np.random.default_rng(0).normal(size=(1, DIM)), (50, 1))
    for _ in range(3):
        rows, back = send(plain, range(50), gradients)
        data, same = send(packed, range(50), gradients)
        assert len(data) < len(rows)
        assert back.tobytes() == same.tobytes()


def test_memory_is_what_it_was_given():
    for dim, max_bytes in ((1, 1000), (16, 1 << 20), (64, 12345)):
        residuals = Residuals(RowCodec(Compression("int8"), dim), max_bytes)
        held = [residuals._index, residuals._known, residuals._links, residuals._kept]
        assert 0.7 * max_bytes - 500 < sum(array.nbytes for array in held) <= max_bytes


def test_what_cannot_be_is_refused():
    codec = RowCodec(Compression("int8", rounding="stochastic"), DIM)
    with pytest.raises(InvalidArgument, match="give at least the 56"):
        Residuals(codec, SLOT - 1)
    with pytest.raises(OutOfMemory, match="give them fewer"):
        Residuals(RowCodec(Compression("int8"), 65536), 1 << 48)
    residuals = Residuals(codec, 1 << 12)
    keys, gradients = np.arange(3, dtype=np.uint64), np.zeros((3, DIM), np.float32)
    out = np.empty(codec.size(3), np.uint8)
    draw = Draw(keys, START, 0)
    for call in (
        lambda: residuals.encode(keys, gradients, out),
        lambda: residuals.encode(keys, gradients, out, draw._replace(keys=keys + np.uint64(1))),
        lambda: residuals.encode(keys, gradients, out[:-1], draw),
    ):
        with pytest.raises(InvalidArgument):
            call()
    for call in (
        lambda: residuals.encode(keys[:2], gradients, out, draw),
        lambda: residuals.encode(keys, gradients[:, 1:], out, draw),
        lambda: residuals.encode(keys.astype(np.int64), gradients, out, draw),
    ):
        with pytest.raises(Malformed):
            call()
    assert residuals.stats()["keys"] == 0
