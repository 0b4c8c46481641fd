# SPDX-License-Identifier: Apache-2.0
"""Data sets of users and items: import of rating files, generated ones, the folder's form, and what is refused."""

import gzip
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from oarlock.data.files import list_files
from oarlock.data.interactions import (
    TEST_COLUMNS,
    TRAIN_COLUMNS,
    list_test,
    list_train,
    load_catalogue,
    load_positives,
    load_test,
    read_info,
    rows_per_group,
    to_lists,
)
from oarlock.data.ncf_files import import_ncf
from oarlock.data.planted import generate_ncf, plant
from oarlock.data.ranking import count_lists, expected_hit_rate, rank_lists, sum_ranks
from oarlock.data.reader import open_reader
from oarlock.data.splits import plan_splits
from oarlock.proto.errors import InvalidArgument, NotFound

TRAIN = "0\t10\t5\t111\n0\t11\t3\t112\n1\t10\t1\t113\n2\t12\t1\t114\n"
TEST = "0\t12\t5\t1\n1\t13\t4\t2\n"
NEGATIVE = "(0,12)\t20\t13\n(1,13)\t11\t21\n"


def source(folder: Path, train: str = TRAIN, test: str = TEST, negative: str = NEGATIVE) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "x.train.rating").write_text(train)
    (folder / "x.test.rating").write_text(test)
    (folder / "x.test.negative").write_text(negative)
    return folder


def pairs(folder: Path) -> list[tuple[int, int]]:
    reader = open_reader("arrow")
    parts = [reader.read(plan, TRAIN_COLUMNS) for plan in plan_splits(list_train(folder), 1)]
    return [(int(u), int(i)) for part in parts for u, i in zip(part["user"], part["item"], strict=True)]


def test_import(tmp_path: Path) -> None:
    stages = []
    info = import_ncf(
        source(tmp_path / "in"),
        tmp_path / "out",
        progress=lambda stage, done, total: stages.append((stage, done, total)),
    )
    assert (info.users, info.items, info.train_rows, info.test_rows) == (3, 6, 4, 2)
    assert info == read_info(tmp_path / "out")
    assert sorted(pairs(tmp_path / "out")) == [(0, 10), (0, 11), (1, 10), (2, 12)]
    test = load_test(list_test(tmp_path / "out"))
    assert test.users.tolist() == [0, 1]
    assert test.offsets.tolist() == [0, 3, 6]
    assert test.items.tolist() == [12, 20, 13, 13, 11, 21]
    assert load_catalogue(list_train(tmp_path / "out")).tolist() == [10, 11, 12]
    assert load_catalogue(list_train(tmp_path / "out"), list_test(tmp_path / "out")).tolist() == [
        *(10, 11, 12, 13),
        *(20, 21),
    ]
    assert load_positives(list_train(tmp_path / "out")).offsets.tolist() == [0, 2, 3, 4]
    assert stages[0] == ("read", 0, 3)
    assert stages[-2:] == [("write train", 4, 4), ("write test", 2, 2)]
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


@pytest.mark.parametrize("width", [2, 3, 4])
@pytest.mark.parametrize("ending", ["", ".zst"])
def test_forms_of_the_source(tmp_path: Path, width: int, ending: str) -> None:
    folder = source(tmp_path / "in")
    lines = ["\t".join(line.split("\t")[:width]) for line in TRAIN.splitlines()]
    (folder / "x.train.rating").unlink()
    text = "\r\n".join(lines).encode()
    if ending:
        text = pa.compress(text, "zstd", asbytes=True)
    (folder / f"y.train.tsv{ending}").write_bytes(text)
    import_ncf(folder, tmp_path / "out")
    assert sorted(pairs(tmp_path / "out")) == [(0, 10), (0, 11), (1, 10), (2, 12)]


def test_lists_of_different_lengths_and_blank_lines(tmp_path: Path) -> None:
    text = "(0,12)\t20\t13\t14\n\n(1,13)\t11\t\n"
    import_ncf(source(tmp_path / "in", negative=text, train=TRAIN + "\n"), tmp_path / "out")
    test = load_test(list_test(tmp_path / "out"))
    assert test.offsets.tolist() == [0, 4, 6]
    assert test.items.tolist() == [12, 20, 13, 14, 13, 11]


def test_training_rows_are_a_seeded_shuffle(tmp_path: Path) -> None:
    rows = [(u, i) for u in range(60) for i in range(100, 140)]
    train = "".join(f"{u}\t{i}\n" for u, i in rows)
    folder = source(tmp_path / "in", train=train)
    orders = []
    for seed in (0, 0, 1):
        import_ncf(folder, tmp_path / "out", seed=seed)
        orders.append(pairs(tmp_path / "out"))
    assert sorted(orders[0]) == rows
    assert orders[0] == orders[1]
    assert orders[0] != orders[2]
    # Each of the row groups has users of the whole range.
    plan = plan_splits(list_train(tmp_path / "out"), 1)
    assert [p.rows for p in plan] == [800, 800, 800]
    for split in plan:
        users = open_reader("arrow").read(split, TRAIN_COLUMNS)["user"]
        assert np.unique(users).size > 55


@pytest.mark.parametrize(
    ("rows", "wanted"), [(0, 1), (1, 1), (1000, 1000), (40_000, 1250), (994_169, 31_068), (10_000_000, 65_360)]
)
def test_row_groups_are_equal_and_bounded(rows: int, wanted: int) -> None:
    assert rows_per_group(rows, 32, 1024, 65536) == wanted


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("train", TRAIN + "3\tx\n", r"x\.train\.rating, line 5: item 'x' is not an integer"),
        ("train", "user\titem\n" + TRAIN, r"line 1: user 'user' is not an integer"),
        ("train", TRAIN + "\n3\t-4\t5\t6\n", "line 6: item -4 is outside 0"),
        ("train", TRAIN + "3\t\t5\t6\n", "line 5: item '' is not an integer"),
        ("train", TRAIN + "3\n", "line 5: 1 columns; expected user, item"),
        ("train", "1\t2\t3\t4\t5\n", "line 1: 5 columns"),
        ("train", "1,2\n", "line 1: 1 columns"),
        ("train", "3\t9223372036854775808\n", "line 1: item 9223372036854775808 is outside"),
        ("train", "", r"x\.train\.rating: the file is empty"),
        ("train", "3\t1.5\n", "line 1: item '1.5' is not an integer"),
        ("test", "0\t12\n-1\t13\n", r"x\.test\.rating, line 2: user -1 is outside"),
        ("test", "0\t12\n", r"x\.test\.negative: 2 lines, but x\.test\.rating has 1"),
        ("test", "0\t12\n1\t14\n", r"x\.test\.negative, line 2: is of \(1,13\), but .* is of \(1,14\)"),
        ("negative", "(0,12)\t20\n(1,13)\tx\n", r"x\.test\.negative, line 2: negative item 'x' is not an integer"),
        ("negative", "(0,12)\t20\n(1,13)\t-3\n", "line 2: negative item -3 is outside"),
        ("negative", "(0,12)\t20\n1,13\t21\n", r"line 2: '1,13': expected \(user,item\)"),
        ("negative", "(0,12)\t20\n(1;13)\t21\n", "line 2: .*expected"),
        ("negative", "(0,12)\t20\n1\t13\t(,)21\n", "line 2: .*expected"),
        ("negative", "(0,12)\t20\n(1,13)\n", "line 2: no negative item"),
        ("negative", "", r"x\.test\.negative: the file is empty"),
    ],
)
def test_bad_lines_are_named(tmp_path: Path, name: str, text: str, message: str) -> None:
    folder = source(tmp_path / "in", **{name: text})
    with pytest.raises(InvalidArgument, match=message) as caught:
        import_ncf(folder, tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_bad_sources_are_named(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="no such directory"):
        import_ncf(tmp_path / "nowhere", tmp_path / "out")
    folder = source(tmp_path / "in")
    (folder / "y.train.rating").write_text(TRAIN)
    with pytest.raises(InvalidArgument, match=r"2 files \*\.train\.rating.*x\.train\.rating, y\.train\.rating"):
        import_ncf(folder, tmp_path / "out")
    for path in folder.glob("*.train.rating"):
        path.unlink()
    with pytest.raises(NotFound, match=r"no file \*\.train\.rating\[\.zst\] or \*\.train\.tsv"):
        import_ncf(folder, tmp_path / "out")
    (folder / "x.train.rating.zst").write_bytes(gzip.compress(TRAIN.encode()))
    with pytest.raises(InvalidArgument, match=r"x\.train\.rating\.zst: cannot be read"):
        import_ncf(folder, tmp_path / "out")


def test_only_an_earlier_data_set_is_replaced(tmp_path: Path) -> None:
    folder, out = source(tmp_path / "in"), tmp_path / "out"
    out.mkdir()
    import_ncf(folder, out)
    import_ncf(source(folder, train="7\t8\n"), out)
    assert pairs(out) == [(7, 8)]
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.txt").write_text("years of work")
    with pytest.raises(InvalidArgument, match="other: not empty and not an earlier data set"):
        import_ncf(folder, other)
    assert (other / "thesis.txt").read_text() == "years of work"
    with pytest.raises(InvalidArgument, match="is a file"):
        generate_ncf(other / "thesis.txt")


def test_a_failed_write_leaves_the_earlier_data_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, out = source(tmp_path / "in"), tmp_path / "out"
    import_ncf(folder, out)
    before = pairs(out)

    def fail(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("oarlock.data.interactions.json.dumps", fail)
        with pytest.raises(InvalidArgument, match=r"cannot be written .*No space left"):
            import_ncf(source(folder, train="7\t8\n"), out)
    assert pairs(out) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out"]


def test_a_folder_that_is_no_data_set_is_named(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match=r"dataset\.json: no such file; name a folder made by 'oarlock data import'"):
        list_train(tmp_path)
    for text, message in [
        ("{", "not readable as JSON"),
        ("[]", "not a data set"),
        ('{"format": "oarlock-interactions", "version": 99}', "format version 99, this Oarlock reads 1"),
        ('{"format": "oarlock-interactions", "version": 1}', "incomplete"),
    ]:
        (tmp_path / "dataset.json").write_text(text)
        with pytest.raises(InvalidArgument, match=message):
            list_test(tmp_path)


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("planted") / "data"
    generate_ncf(folder, users=300, items=400, positives_per_user=12, groups=8, noise=0.2, seed=5)
    return folder


def test_planted_data_are_whole(planted: Path) -> None:
    info = read_info(planted)
    test = load_test(list_test(planted))
    assert (info.users, info.train_rows, info.test_rows) == (300, 3600, 300)
    assert info.items == load_catalogue(list_train(planted), list_test(planted)).size
    taken = pairs(planted)
    assert len(set(taken)) == 3600
    assert [len(part) for part in np.split(test.items, test.offsets[1:-1])] == [100] * 300
    known = set(taken)
    for user, listed in zip(test.users.tolist(), np.split(test.items, test.offsets[1:-1]), strict=True):
        assert len(set(listed.tolist())) == 100
        assert all((user, item) not in known for item in listed.tolist())


def test_the_planted_figures_are_right(planted: Path) -> None:
    figures = read_info(planted).figures
    test = load_test(list_test(planted))
    user_group, chances = plant(300, 400, 8, 0.2, 5)
    assert chances.sum(axis=1) == pytest.approx(np.ones(8))
    rows = np.repeat(np.arange(300), 100)
    oracle = chances[user_group[rows], test.items.astype(int)].astype(np.float32)
    assert figures["best_hr@10"] == expected_hit_rate(*count_lists(oracle, test.offsets, test.items), 10)
    counts = np.bincount([item for _, item in pairs(planted)], minlength=400).astype(np.float32)
    popular = count_lists(counts[test.items.astype(int)], test.offsets, test.items)
    assert figures["popularity_hr@10"] == expected_hit_rate(*popular, 10)
    # With 20 % noise about 0.8 can be known; what is popular tells little.
    assert 0.7 < figures["best_hr@10"] < 0.92
    assert figures["popularity_hr@10"] < 0.3
    assert sum_ranks(rank_lists(np.zeros_like(oracle), test.offsets, test.items), 10).hits == 0


def test_planted_data_are_a_pure_function(planted: Path, tmp_path: Path) -> None:
    arguments = {"users": 300, "items": 400, "positives_per_user": 12, "groups": 8, "noise": 0.2}
    generate_ncf(tmp_path / "same", **arguments, seed=5)
    generate_ncf(tmp_path / "other", **arguments, seed=6)
    assert pairs(tmp_path / "same") == pairs(planted)
    assert json.loads((tmp_path / "same" / "dataset.json").read_text()) == json.loads(
        (planted / "dataset.json").read_text()
    )
    assert pairs(tmp_path / "other") != pairs(planted)


def test_most_positives_are_of_the_users_group(planted: Path) -> None:
    user_group, chances = plant(300, 400, 8, 0.2, 5)
    item_group = chances.argmax(axis=0)
    taken = np.array(pairs(planted))
    inside = (user_group[taken[:, 0]] == item_group[taken[:, 1]]).mean()
    assert 0.75 < inside < 0.9


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"items": 120}, "items = 120: 25 positives a user, a test item and 99 negatives need 125"),
        ({"users": 0}, "users = 0"),
        ({"groups": 900}, "groups = 900"),
        ({"noise": 0.0}, "noise = 0.0"),
        ({"positives_per_user": 0}, "positives_per_user = 0"),
    ],
)
def test_what_cannot_be_planted_is_refused(tmp_path: Path, arguments: dict[str, int], message: str) -> None:
    with pytest.raises(InvalidArgument, match=message):
        generate_ncf(tmp_path / "out", **arguments)  # type: ignore[arg-type]
    assert not (tmp_path / "out").exists()


def test_both_readers_give_the_same_test_lists(planted: Path) -> None:
    plan = plan_splits(list_files(planted / "test"), 1)
    assert len(plan) > 1
    for split in plan:
        lists = [to_lists(open_reader(kind).read(split, TEST_COLUMNS)) for kind in ("auto", "arrow")]
        assert np.array_equal(lists[0].items, lists[1].items)
        assert np.array_equal(lists[0].offsets, lists[1].offsets)
