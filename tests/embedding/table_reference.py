# SPDX-License-Identifier: Apache-2.0
"""A table as a dict of rows: what every operation means, one key after the other, written from the contracts.

``Model`` has no index, no slots, no requests and no file: what comes out of it cannot depend on them. Arithmetic comes from
the twins of the optimizers; stored weights are rounded by the kernels of ``embedding/precision.py`` and counted by
``embedding/sketch.py``, which have twins of their own. Loaded by conftest under the name ``table_reference``.
"""

import sys

import numpy as np

from oarlock.embedding.hashing import blocks_of
from oarlock.embedding.optimizers import optimizer_of
from oarlock.embedding.pointer import address_of
from oarlock.embedding.precision import decode_row, encode_nearest, encode_row, precision_code, row_scale, weight_bytes
from oarlock.embedding.sketch import Sketch
from oarlock.embedding.spec import TableSpec
from oarlock.embedding.table import Table

f = np.float32
MOST = (1 << 32) - 1
WAITING_MOST = (1 << 27) - 1
reference = sys.modules["embedding_reference"]
optimizer_reference = sys.modules["optimizer_reference"]


class Row:
    """One row: ``stored`` weights as bytes, state, counters, and what came before each of the last updates."""

    def __init__(self, stored, state):
        self.stored, self.state = stored, state
        self.occurrences = self.updated = self.version = 0
        self.shows, self.clicks = f(0), f(0)
        self.ring = []


def power(base, exponent):
    result = 1.0
    while exponent:
        if exponent & 1:
            result *= base
        base *= base
        exponent >>= 1
    return result


def score(spec, shows, clicks):
    return float(shows - clicks) * spec.admission.nonclick + float(clicks) * spec.admission.click


class Model:
    def __init__(self, spec: TableSpec, seed):
        self.spec, self.seed = spec, seed
        self.bits = spec.blocks.bit_length() - 1
        self.code = precision_code(spec.dtype)
        self.salt = reference.salt(spec.name)
        self.origin = reference.mix64((seed + reference.mix64(self.salt)) & reference.WORD)
        self.rows, self.waiting = {}, {}
        self.sketches, self.versions, self.graves = {}, {}, {}
        self.left = {}  # by block, the highest version of a row that was evicted

    # Pure functions of the spec

    def block(self, key):
        return reference.block(self.spec.name, self.bits, key)

    def of(self, block, keys=None):
        return [key for key in (self.rows if keys is None else keys) if self.block(key) == block]

    def stream(self, key):
        return reference.mix64(self.origin ^ reference.mix64((key + reference.GOLDEN) & reference.WORD))

    def seed_of(self, key, step):
        scrambled = reference.mix64((self.stream(key) + reference.GOLDEN) & reference.WORD)
        return np.uint64(reference.mix64(scrambled ^ step & reference.WORD))

    def draw(self, key, step):
        x = self.stream(key) ^ reference.mix64((step + reference.GOLDEN) & reference.WORD)
        return (reference.mix64(x) >> 11) * 2.0**-53

    def parts(self):
        """Yield each part with its columns and its columns of state."""
        column = state = 0
        for part in self.spec.all_parts:
            wide = optimizer_of(part.optimizer).state_columns(part.width)
            yield part, slice(column, column + part.width), slice(state, state + wide)
            column, state = column + part.width, state + wide

    def first(self, key):
        return np.array(
            [
                reference.first_value(self.seed, self.spec.name, key, column, i.kind, i.mean, i.scale)
                for part, columns, _ in self.parts()
                for i in [part.initializer]
                for column in range(columns.start, columns.stop)
            ],
            f,
        )

    def encoded(self, weights, seed=None, scale=0.0):
        stored = np.zeros(weight_bytes(self.code, self.spec.dim), np.uint8)
        weights = np.ascontiguousarray(weights, f)
        if seed is None:
            encode_nearest(address_of(stored), self.code, self.spec.dim, address_of(weights), f(scale))
        else:
            encode_row(address_of(stored), self.code, self.spec.dim, address_of(weights), seed)
        return stored

    def decoded(self, row):
        out = np.empty(self.spec.dim, f)
        decode_row(address_of(row.stored), self.code, self.spec.dim, address_of(out))
        return out

    def new_row(self, key):
        states = [optimizer_of(part.optimizer).initial_state(part.optimizer, part.width) for part, *_ in self.parts()]
        return Row(self.encoded(self.first(key), self.seed_of(key, 0)), np.concatenate(states))

    def counters(self, row):
        """Return the counters that the spec's policies need, in the order of the format."""
        spec, kind = self.spec, self.spec.admission.kind
        budget = spec.eviction.max_bytes > 0
        out = []
        if (
            spec.usage
            or spec.eviction.occurrences
            or kind in ("count", "sketch")
            or (budget and spec.eviction.order == "frequent")
        ):
            out.append(row.occurrences)
        if spec.usage or spec.eviction.age or (budget and spec.eviction.order == "recent"):
            out.append(row.updated)
        if spec.eviction.score or kind == "score":
            out += np.array([row.shows, row.clicks], f).view(np.uint32).tolist()
        return out + ([row.version] if spec.cache else [])

    # Blocks

    def adopt(self, block, version=0):
        admission = self.spec.admission
        self.versions[block], self.graves[block], self.left[block] = version, [], 0
        if admission.kind == "sketch":
            self.sketches[block] = Sketch(max(1, admission.capacity // self.spec.blocks), windows=admission.windows)

    def drop(self, block):
        for kept in (self.rows, self.waiting):
            for key in self.of(block, list(kept)):
                del kept[key]
        for kept in (self.sketches, self.versions, self.graves, self.left):
            kept.pop(block, None)

    def import_rows(self, block, content, version):
        sketch = content.sketch
        self.drop(block)
        self.adopt(block, version)
        states = content.state[:, : sum(part.stop - part.start for *_, part in self.parts())]
        for i, key in enumerate(content.keys.tolist()):
            scale = content.state[i, -1] if self.spec.dtype == "int8" else 0
            row = self.rows[key] = Row(self.encoded(content.weights[i], scale=scale), states[i].copy())
            counted = content.counters[i].tolist() if content.counters.size else [0] * 5
            names = self.counter_names()
            for name, value in zip(names, counted, strict=False):
                setattr(row, name, np.array([value], np.uint32).view(f)[0] if name in ("shows", "clicks") else value)
        self.waiting |= zip(content.waiting.tolist(), content.waited.tolist(), strict=True)
        if sketch:
            self.sketches[block].load(sketch)

    def counter_names(self):
        probe = Row(None, None)
        probe.occurrences, probe.updated, probe.shows, probe.clicks, probe.version = 1, 2, f(3), f(4), 5
        names = {1: "occurrences", 2: "updated", 5: "version"}
        names |= {int(f(3).view(np.uint32)): "shows", int(f(4).view(np.uint32)): "clicks"}
        return [names[value] for value in self.counters(probe)]

    def content(self):
        """Return {key: bytes} of all rows as an export shows them."""
        out = {}
        for key, row in self.rows.items():
            state = row.state
            if self.spec.dtype == "int8":
                scale = row_scale(address_of(row.stored), self.code, self.spec.dim)
                state = np.append(state, f(scale))
            counters = np.array(self.counters(row), np.uint32)
            out[key] = self.decoded(row).tobytes() + state.astype(f).tobytes() + counters.tobytes()
        return out

    # Requests

    def pull(self, key):
        row = self.rows.get(key)
        if row is not None:
            return self.decoded(row)
        return np.zeros(self.spec.dim, f) if self.spec.absent == "zeros" else self.first(key)

    def admits(self, key, amount, click, step):
        """Return whether an absent key gets its row, and how often it had come before."""
        admission = self.spec.admission
        if admission.kind == "count":
            total = min(self.waiting.pop(key, 0) + amount, WAITING_MOST)
            if total < admission.occurrences:
                self.waiting[key] = total
                return False, 0
            return True, max(total - amount, 0)
        if admission.kind == "sketch":
            mix = np.array([reference.mix64(key ^ self.salt)], np.uint64)
            total = int(self.sketches[self.block(key)].add(mix, np.array([amount], np.int64))[0])
            return total >= admission.occurrences, max(total - amount, 0)
        if admission.kind == "probability":
            return self.draw(key, step) < 1.0 - power(1.0 - admission.probability, amount), 0
        if admission.kind == "score":
            value = (amount - click) * admission.nonclick + click * admission.click
            return value >= 1.0 or self.draw(key, step) < value, 0
        return True, 0

    def refuses(self, gradient):
        return not (np.abs(gradient) < f(self.spec.guard.limit)).all()

    def push(self, key, gradient, rate, step, amount=1, click=0.0):
        """Push one key; return "applied", "created", "refused" or "waiting"."""
        if self.refuses(gradient):
            return "refused"
        row, result = self.rows.get(key), "applied"
        if row is None:
            yes, before = self.admits(key, amount, float(click), step)
            if not yes:
                return "waiting"
            row, result = self.new_row(key), "created"
            self.rows[key] = row
            row.occurrences = before
            left = self.left.get(self.block(key), 0)
            row.version = min(left + self.spec.cache.bound, MOST - 1) if self.spec.cache and left else 0
        row.occurrences = min(row.occurrences + amount, MOST)
        row.version = min(row.version + 1, MOST)
        row.updated = min(max(step, 0), MOST)
        row.shows, row.clicks = row.shows + f(amount), row.clicks + f(click)
        if self.spec.guard.undo:
            row.ring = [*row.ring, (row.stored, row.state.copy())][-self.spec.guard.undo :]
        weights = self.decoded(row)
        for part, columns, state in self.parts():
            now = rate * part.optimizer.schedule.factor(step)
            optimizer_reference.twin(part.optimizer, weights[columns], row.state[state], gradient[columns], now, step)
        row.stored = self.encoded(weights, self.seed_of(key, step))
        return result

    def undo(self, key, steps):
        row = self.rows.get(key)
        done = min(steps, len(row.ring)) if row is not None else 0
        for _ in range(done):
            row.stored, row.state = row.ring.pop()
        if done:
            row.version = min(row.version + 1, MOST)
        return done

    def bury(self, key):
        block = self.block(key)
        self.left[block] = max(self.left[block], self.rows.pop(key).version)

    # Eviction

    def leaves(self, row, tick):
        rules = self.spec.eviction
        if rules.score:
            row.shows, row.clicks = row.shows * f(rules.decay), row.clicks * f(rules.decay)
        norm = 0.0
        for weight in self.decoded(row).tolist():
            norm += weight * weight
        return (
            (rules.age and tick - row.updated > rules.age)
            or (rules.occurrences and row.occurrences < rules.occurrences)
            or (rules.score and score(self.spec, row.shows, row.clicks) < rules.score)
            or (rules.norm and norm < rules.norm**2)
        )

    def sweep(self, block, tick):
        """Return the keys that a whole round over the block evicts."""
        gone = [key for key in self.of(block) if self.leaves(self.rows[key], tick)]
        for key in gone:
            self.bury(key)
        return gone

    def oldest(self, block, n):
        """Evict and return the n rows that were least recently, or least frequently, updated; of equal ones the least keys."""
        recent = self.spec.eviction.order == "recent"
        order = sorted((self.rows[k].updated if recent else self.rows[k].occurrences, k) for k in self.of(block))
        gone = [key for _, key in order[:n]]
        for key in gone:
            self.bury(key)
        return gone


# How tests speak to a table


def group(name, bits, keys, stored):
    """Return (keys, blocks, counts, positions) of those keys whose block is stored, repeated ones included."""
    blocks = np.empty(len(keys), np.int32)
    blocks_of(np.array(keys, np.uint64), np.uint64(reference.salt(name)), bits, blocks)
    used = [block for block in np.unique(blocks).tolist() if block in stored]
    positions = np.concatenate([np.flatnonzero(blocks == block) for block in used] or [np.zeros(0, np.int64)])
    return (
        np.array([keys[i] for i in positions], np.uint64),
        np.array(used, np.int32),
        np.array([np.count_nonzero(blocks == block) for block in used], np.int32),
        positions,
    )


def stored(spec, seed=7, folder=None):
    """Return a table with all of its blocks."""
    table = Table(spec, seed=seed, spill_folder=folder)
    for block in range(spec.blocks):
        table.adopt(block)
    return table


def push(table, keys, gradients=None, rate=0.125, *, step=1, **aside):
    """Push keys in the order given, with a gradient each (default: ones), occurrences and clicks."""
    keys = [int(key) for key in keys]
    gradients = np.ones((len(keys), table.spec.dim), f) if gradients is None else gradients
    grouped, blocks, counts, order = group(table.spec.name, table.bits, keys, set(table.owned.tolist()))
    aside = {name: np.asarray(values)[order] for name, values in aside.items()}
    return table.push(grouped, blocks, counts, gradients[order], rate=rate, step=step, **aside)


def pull(table, keys):
    """Return the weights of keys, and how many of them have a row."""
    keys = [int(key) for key in keys]
    grouped, blocks, counts, order = group(table.spec.name, table.bits, keys, set(table.owned.tolist()))
    rows = np.full((len(grouped), table.spec.dim), np.nan, f)
    present = table.pull(grouped, blocks, counts, rows)
    out = np.empty_like(rows)
    out[order] = rows
    return out, present


def content(table):
    """Return {key: bytes} of all rows, {key: count} of those that wait, and the blocks' sketches."""
    rows, waiting, sketches = {}, {}, {}
    for block in table.owned.tolist():
        found = table.export_block(block)
        for i, key in enumerate(found.keys.tolist()):
            assert key not in rows
            rows[key] = found.weights[i].tobytes() + found.state[i].tobytes() + found.counters[i].tobytes()
        waiting |= zip(found.waiting.tolist(), found.waited.tolist(), strict=True)
        sketches[block] = found.sketch
    return rows, waiting, sketches
