# SPDX-License-Identifier: Apache-2.0
"""The manifest: comes back equal, names every block once, and is refused when anything in it was changed."""

import hashlib
import json
from dataclasses import asdict, replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from oarlock.checkpoint.format import block_file_name, cut_folder, folder_cut, is_block_file
from oarlock.checkpoint.manifest import BlockEntry, ClosedSet, Manifest
from oarlock.embedding.spec import NAME
from oarlock.proto.errors import CorruptCheckpoint, InvalidArgument, PSError, SpecMismatch, VersionMismatch


def entry(kind: str, name: str, block: int, rows: int = 4, **changes: Any) -> BlockEntry:
    values = asdict(BlockEntry(kind, name, block, block_file_name(kind, name, block), 100, rows, 7, "ab" * 32))
    return BlockEntry(**{**values, **changes})


ENTRIES = [
    entry("rows", "user", 0),
    entry("rows", "user", 1),
    entry("rows", "Item", 0),
    entry("dense", "tower.0-w", 0, 4),
    entry("dense", "tower.0-w", 1, 2),
]


@pytest.fixture
def manifest(make_manifest: Any) -> Manifest:
    result: Manifest = make_manifest(12, ENTRIES)
    return result


def signed(document: dict[str, Any]) -> bytes:
    """The document as a correct writer of any version would store it."""
    document.pop("checksum", None)
    text = json.dumps(document, sort_keys=True, separators=(",", ":"))
    document["checksum"] = hashlib.sha256(text.encode()).hexdigest()
    lines = []
    for name, value in document.items():
        plain = json.dumps(value, sort_keys=True, separators=(",", ":"))
        if isinstance(value, list) and value and all(isinstance(item, dict) for item in value):
            plain = "[\n" + ",\n".join(json.dumps(v, sort_keys=True, separators=(",", ":")) for v in value) + "\n]"
        lines.append(f'"{name}": {plain}')
    return ("{\n" + ",\n".join(lines) + "\n}\n").encode()


def test_it_comes_back_equal(manifest: Manifest) -> None:
    data = manifest.encode()
    assert Manifest.decode(data) == manifest
    assert Manifest.decode(data).encode() == data
    assert signed(json.loads(data)) == data
    assert json.loads(data)["config"]["label"] == "clické"
    assert manifest.table_specs()["user"].dim == 3
    assert manifest.dense_specs()["tower.0-w"].shape == (3, 2)


def test_order_and_kind_of_sequence_do_not_matter(manifest: Manifest, make_manifest: Any) -> None:
    other = make_manifest(12, ENTRIES[::-1], open_splits=[1 << 40, 7], closed=ClosedSet(4, (9, 4, 6)))
    assert other == manifest
    assert other.encode() == manifest.encode()


def test_it_keeps_no_reference_to_what_it_was_given(make_manifest: Any) -> None:
    config = {"a": [1, 2]}
    manifest = make_manifest(1, ENTRIES, config=config)
    config["a"].append(3)
    assert manifest.config == {"a": [1, 2]}


def test_a_metric_that_is_not_finite_becomes_null(make_manifest: Any) -> None:
    manifest = make_manifest(1, ENTRIES, metrics={"auc": float("nan"), "by": [float("inf"), 1.0]}, best={"x": -0.0})
    assert manifest.metrics == {"auc": None, "by": [None, 1.0]}
    assert Manifest.decode(manifest.encode()) == manifest


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"job": "xyz"}, "job 'xyz'"),
        ({"run": -1}, "run = -1"),
        ({"cut": 1 << 63}, "cut = 9223372036854775808"),
        ({"step": 1.0}, "step = 1.0"),
        ({"seed": -1}, "seed = -1"),
        ({"created": "2026-01-31T12:00:00"}, "created"),
        ({"created": "2026-01-31T12:00:00+01:00"}, "created"),
        ({"created": "noon"}, "created"),
        ({"recipe": None}, "recipe = None"),
        ({"config": {"rate": float("nan")}}, "config has no JSON form"),
        ({"config": {"x": object()}}, "config has no JSON form"),
        ({"config": [1]}, "config: give an object, not list"),
        ({"metrics": 3.0}, "metrics: give an object"),
        ({"open_splits": (6,)}, "split 6 is in open_splits and in closed"),
        ({"open_splits": (-2,)}, "open_splits = -2"),
        ({"tables": ({"name": "user"},)}, "missing 1 required"),
        ({"tables": ({"name": "user", "dim": 3, "colour": 1},)}, "unknown field 'colour'"),
    ],
)
def test_values_that_do_not_fit_are_refused(make_manifest: Any, changes: dict[str, Any], says: str) -> None:
    cut = changes.pop("cut", 1)
    with pytest.raises(InvalidArgument) as caught:
        make_manifest(cut, ENTRIES, **changes)
    assert says in str(caught.value)


@pytest.mark.parametrize(
    ("entries", "says"),
    [
        (ENTRIES[1:], "table user, block 1 is named, but not block 0"),
        (ENTRIES[:1] + ENTRIES[2:], "table user: block 1 is not named"),
        (ENTRIES[:3], "dense parameter tower.0-w: block 0 is not named"),
        ([], "block 0 is not named"),
        ([*ENTRIES, entry("rows", "user", 1)], "table user, block 1 is named, twice"),
        ([*ENTRIES, entry("rows", "user", 2)], "table user, block 2: the specs have no such block"),
        ([*ENTRIES, entry("rows", "other", 0)], "table other, block 0: the specs have no such block"),
        ([*ENTRIES, entry("dense", "user", 0)], "dense parameter user, block 0: the specs have no such block"),
        ([*ENTRIES[:4], entry("dense", "tower.0-w", 1, 4)], "4 values are not its slice"),
        ([entry("rows", "user", 0, file=ENTRIES[1].file), *ENTRIES[1:]], "another block has the file"),
    ],
)
def test_every_block_is_named_once(make_manifest: Any, entries: list[BlockEntry], says: str) -> None:
    with pytest.raises(SpecMismatch) as caught:
        make_manifest(1, entries)
    assert says in str(caught.value)


def test_specs_have_distinct_names(manifest: Manifest) -> None:
    with pytest.raises(SpecMismatch, match="two specs of one table: user, Item, user"):
        replace(manifest, tables=(*manifest.tables, manifest.tables[0]))


@pytest.mark.parametrize(
    "file",
    [
        "../rows-a-00000.arrow",
        "/rows-a-00000.arrow",
        "rows-../a-00000.arrow",
        "rows-a\\..-00000.arrow",
        "rows-a-00000.arrow\0",
        "rows-a-00000.arrow\n",
        "rows-A-00000.arrow",
        "manifest.json",
        "..",
        "",
        "rows-" + "a" * 250 + "-00000.arrow",
        7,
    ],
)
def test_a_file_is_a_plain_name(file: Any) -> None:
    with pytest.raises(InvalidArgument, match="not the plain name"):
        entry("rows", "user", 0, file=file)


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        (lambda d: d.update(format_version="2.0"), VersionMismatch, "checkpoint format 2.0; this Oarlock reads 1.x"),
        (lambda d: d.update(format_version="1.3", colour=1), VersionMismatch, "'colour' is unknown; it was written in"),
        (lambda d: d["tables"][0].update(colour=1) or d.update(format_version="1.3"), VersionMismatch, "colour"),
        (lambda d: d["blocks"][0].update(colour=1) or d.update(format_version="1.3"), VersionMismatch, "colour"),
        (lambda d: d.update(format_version=1), CorruptCheckpoint, "no format version"),
        (lambda d: d.update(colour=1), CorruptCheckpoint, "the field 'colour' is unknown"),
        (lambda d: d.pop("seed"), CorruptCheckpoint, "the field 'seed' is missing"),
        (lambda d: d["tables"][0].update(colour=1), CorruptCheckpoint, "unknown field 'colour'"),
        (lambda d: d["blocks"].pop(), CorruptCheckpoint, "is not named"),
        (lambda d: d["blocks"][0].pop("seq"), CorruptCheckpoint, "a block has the fields"),
        (lambda d: d.update(blocks=[1]), CorruptCheckpoint, "a block has int"),
        (lambda d: d.update(blocks=None), CorruptCheckpoint, "not iterable"),
        (lambda d: d.update(open_splits=3), CorruptCheckpoint, "not iterable"),
        (lambda d: d["blocks"][0].update(file="../x"), CorruptCheckpoint, "not the plain name"),
        (lambda d: d["blocks"][0].update(block=None), CorruptCheckpoint, "block = None"),
        (lambda d: d["closed"].update(floor="x"), CorruptCheckpoint, "closed.floor = 'x'"),
        (lambda d: d["closed"].update(above=["x"]), CorruptCheckpoint, "closed.above = 'x'"),
    ],
)
def test_contents_that_do_not_fit_are_refused(manifest: Manifest, change: Any, error: type[PSError], says: str) -> None:
    document = json.loads(manifest.encode())
    change(document)
    with pytest.raises(error) as caught:
        Manifest.decode(signed(document), file="cut-000012/manifest.json")
    assert says in str(caught.value)
    assert str(caught.value).startswith("cut-000012/manifest.json: ")


def test_a_newer_minor_version_without_news_is_read(manifest: Manifest) -> None:
    document = json.loads(manifest.encode())
    document["format_version"] = "1.9"
    assert Manifest.decode(signed(document)) == replace(manifest, format_version="1.9")


def test_changes_that_mean_the_same_are_refused_too(manifest: Manifest) -> None:
    data = manifest.encode()
    assert b"1e-05" in data
    for changed in (data.replace(b"1e-05", b"1E-05"), data.replace(b"click\\u00e9", b"click\\u00E9"), data + b"\n"):
        assert json.loads(changed) == json.loads(data)
        with pytest.raises(CorruptCheckpoint, match="altered"):
            Manifest.decode(changed)


@pytest.mark.parametrize("data", [b"", b"{}", b"[]", b"null", b"{" * 100_000, b'{"a":' * 100_000, b"NaN", b"\xff"])
def test_other_bytes_are_refused(data: bytes) -> None:
    with pytest.raises(CorruptCheckpoint, match=r"manifest.json: (truncated or )?altered"):
        Manifest.decode(data)


@given(st.integers(0, 30), st.sets(st.integers(0, 60)))
def test_the_closed_set_is_a_set(floor: int, above: set[int]) -> None:
    closed = ClosedSet(floor, tuple(above))
    members = {split for split in range(100) if split < floor or split in above}
    assert {split for split in range(100) if split in closed} == members
    assert closed.floor not in members
    lowest = next(split for split in range(100) if split not in members)
    assert closed == ClosedSet(0, tuple(members)) == ClosedSet(lowest, tuple(sorted(members, reverse=True)))


# File names


@given(
    st.tuples(st.sampled_from(["rows", "dense"]), st.from_regex(NAME, fullmatch=True), st.integers(0, 1 << 31)),
    st.tuples(st.sampled_from(["rows", "dense"]), st.from_regex(NAME, fullmatch=True), st.integers(0, 1 << 31)),
)
def test_file_names_are_plain_and_distinct(a: tuple[str, str, int], b: tuple[str, str, int]) -> None:
    assert is_block_file(block_file_name(*a))
    assert (block_file_name(*a).casefold() == block_file_name(*b).casefold()) == (a == b)


def test_names_that_could_be_taken_for_each_other() -> None:
    names = [
        "a",
        "A",
        "a-1",
        "a-00001",
        "aA",
        "Aa",
        "AA",
        "a.arrow",
        "a-00001.arrow",
        "rows-a",
        "a_1",
        "a--",
        "X" * 128,
    ]
    blocks = (0, 1, 12345, 123456, 1 << 30)
    files = {block_file_name(kind, name, block) for kind in ("rows", "dense") for name in names for block in blocks}
    assert len({file.casefold() for file in files}) == 2 * len(names) * len(blocks)
    assert all(is_block_file(file) for file in files)
    assert max(map(len, files)) < 255


def test_file_names_stay_as_they_are() -> None:
    assert block_file_name("rows", "user", 12) == "rows-user-00012.arrow"
    assert block_file_name("dense", "User_ID", 1234567) == "dense-user_id=61-1234567.arrow"
    assert cut_folder(12) == "cut-000012"
    assert cut_folder(12345678) == "cut-12345678"


@pytest.mark.parametrize("cut", [0, 12, 999_999, 1_000_000, 123_456_789])
def test_a_cut_has_one_folder(cut: int) -> None:
    assert folder_cut(cut_folder(cut)) == cut
    assert folder_cut(cut_folder(cut).replace("-", "-0")) is None


@pytest.mark.parametrize("name", ["cut-", "cut-12", "cut-00001x", "Cut-000012", "cut-000012.tmp", "cut-000012\n", ""])
def test_other_folders_are_no_cuts(name: str) -> None:
    assert folder_cut(name) is None
