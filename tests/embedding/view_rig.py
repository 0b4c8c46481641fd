# SPDX-License-Identifier: Apache-2.0
"""What the tests of views share. Loaded by conftest under the name ``view_rig``."""


def as_dict(rows):
    """Return {key: bytes} of rows, {key: count} of waiting keys, and the sketch."""
    found = {}
    for i, key in enumerate(rows.keys.tolist()):
        assert key not in found
        found[key] = rows.weights[i].tobytes() + rows.state[i].tobytes() + rows.counters[i].tobytes()
    waiting = dict(zip(rows.waiting.tolist(), rows.waited.tolist(), strict=True))
    assert len(waiting) == len(rows.waiting)
    return found, waiting, rows.sketch


def merged(before, changes):
    """Return what a store has of a block, in the form of ``as_dict``, once it took changes."""
    rows, waiting, sketch = as_dict(changes.rows)
    gone = set(changes.gone.tolist())
    assert len(gone) == len(changes.gone)
    assert not gone & set(rows)
    kept = {key: row for key, row in before[0].items() if key not in gone and key not in waiting}
    waits = {key: count for key, count in before[1].items() if key not in gone and key not in rows}
    return kept | rows, waits | waiting, sketch
