# SPDX-License-Identifier: Apache-2.0
"""Generated interactions whose best HR@10 is known: preferences are planted, so what can be learnt can be computed.

The model: users and items belong to latent groups, and items differ in weight. A user's next item is drawn, without
repetition, from
    p(i | u) = (1 - noise) * [group(i) = group(u)] * weight(i) / (sum of weights in the group) + noise / items
and the last one drawn is the test positive. Negatives are uniform over the items that the user did not take. So nothing
ranks a test list better, in expectation, than p itself: its HR@10 on the written lists, ties broken evenly, is
``best_hr@10``. Invariant: the data are a pure function of the arguments. Callable from any thread.
"""

import os

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from oarlock.data.draws import IMPORT_ORDER, PLANTED, fill_units, stream_of, word
from oarlock.data.interactions import (
    DatasetInfo,
    ListedItems,
    Progress,
    check_out_dir,
    quiet,
    read_info,
    tabulate_test,
    write_dataset,
)
from oarlock.data.order import permutation
from oarlock.data.ranking import count_lists, expected_hit_rate
from oarlock.proto.errors import InvalidArgument

LISTED_NEGATIVES = 99
_CELLS = 1 << 22


def generate_ncf(
    out_dir: str | os.PathLike[str],
    *,
    users: int = 1000,
    items: int = 800,
    positives_per_user: int = 25,
    groups: int = 10,
    noise: float = 0.1,
    seed: int = 0,
    progress: Progress = quiet,
) -> DatasetInfo:
    """Write a data set with planted preferences to ``out_dir``; ``progress(stage, done, total)`` is told of it."""
    _check(users, items, positives_per_user, groups, noise)
    check_out_dir(out_dir)
    shape = (users, items)
    taken = np.empty((users, positives_per_user + 1), np.int64)
    negatives = np.empty((users, LISTED_NEGATIVES), np.int64)
    listed_chance = np.empty((users, LISTED_NEGATIVES + 1), np.float32)
    user_group, chances = plant(users, items, groups, noise, seed)
    step = max(1, _CELLS // items)
    for first in range(0, users, step):
        rows = slice(first, min(first + step, users))
        chance = chances[user_group[rows]]
        # Exponential clocks of rate p ring in the order of drawing without repetition.
        clocks = -np.log1p(-_units(seed, 2, rows, shape)) / chance
        taken[rows] = np.argsort(clocks, axis=1, kind="stable")[:, : positives_per_user + 1]
        lots = _units(seed, 3, rows, shape)
        np.put_along_axis(lots, taken[rows], 2.0, axis=1)
        negatives[rows] = np.argsort(lots, axis=1, kind="stable")[:, :LISTED_NEGATIVES]
        listed_chance[rows] = np.take_along_axis(
            chance, np.concatenate([taken[rows, -1:], negatives[rows]], axis=1), axis=1
        )
        progress("draw", rows.stop, users)
    ids = np.arange(users, dtype=np.int64)
    order = permutation(users * positives_per_user, IMPORT_ORDER, seed)
    train_users = np.repeat(ids, positives_per_user)[order]
    train_items = taken[:, :-1].reshape(-1)[order]
    test_items = np.ascontiguousarray(taken[:, -1])
    lists = _lists(ids, test_items, negatives)
    counts = np.bincount(train_items, minlength=items).astype(np.float32)
    figures = {
        "best_hr@10": _hit_rate(listed_chance.reshape(-1), lists),
        "popularity_hr@10": _hit_rate(counts[lists.items.astype(np.int64)], lists),
    }
    seen = np.unique(np.concatenate([train_items, test_items, negatives.reshape(-1)])).size
    info = DatasetInfo(users, seen, train_items.size, users, "generate ncf", seed, figures)
    offsets = np.arange(users + 1, dtype=np.int64) * LISTED_NEGATIVES
    train = pa.table({"user": train_users, "item": train_items})
    test = tabulate_test(ids, test_items, offsets, negatives.reshape(-1))
    return read_info(write_dataset(out_dir, train, test, info, progress))


def plant(
    users: int, items: int, groups: int, noise: float, seed: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
    """Return (group of each user: int64[users], p of each item for each group: float64[groups, items])."""
    # Groups by a shuffled deal: equal sizes, and ids that tell nothing.
    item_group = permutation(items, PLANTED, seed, 0) % groups
    user_group = permutation(users, PLANTED, seed, 1) % groups
    weights = 1.0 / (1.0 + 3.0 * _units(seed, 1, slice(0, 1), (1, items))[0])
    mine = item_group == np.arange(groups)[:, None]
    share = np.where(mine, weights, 0.0)
    share /= share.sum(axis=1, keepdims=True)
    return user_group, (1.0 - noise) * share + noise / items


def _units(seed: int, use: int, rows: slice, shape: tuple[int, int]) -> npt.NDArray[np.float64]:
    """Return float64[rows, columns] in [0, 1): those rows of the use's matrix of draws."""
    out = np.empty((rows.stop - rows.start) * shape[1], np.float64)
    stream = stream_of(word(seed), word(0), word(0), word(use), word(PLANTED))
    fill_units(np.uint64(stream), np.uint64(rows.start * shape[1]), out)
    return out.reshape(-1, shape[1])


def _lists(
    users: npt.NDArray[np.int64], positives: npt.NDArray[np.int64], negatives: npt.NDArray[np.int64]
) -> ListedItems:
    listed = np.concatenate([positives[:, None], negatives], axis=1)
    offsets = np.arange(users.size + 1, dtype=np.int64) * listed.shape[1]
    return ListedItems(users.astype(np.uint64), offsets, listed.reshape(-1).astype(np.uint64))


def _hit_rate(scores: npt.NDArray[np.float32], lists: ListedItems) -> float:
    return expected_hit_rate(*count_lists(scores, lists.offsets, lists.items), 10)


def _check(users: int, items: int, positives: int, groups: int, noise: float) -> None:
    for name, value in (("users", users), ("positives_per_user", positives), ("groups", groups)):
        if value < 1:
            raise InvalidArgument(f"{name} = {value}: give an integer >= 1")
    if groups > min(users, items):
        raise InvalidArgument(f"groups = {groups}: give at most the number of users and of items")
    if not 0 < noise < 1:
        raise InvalidArgument(f"noise = {noise}: give a number between 0 and 1, both left out")
    need = positives + 1 + LISTED_NEGATIVES
    if items < need:
        raise InvalidArgument(
            f"items = {items}: {positives} positives a user, a test item and {LISTED_NEGATIVES} negatives need {need}"
        )
