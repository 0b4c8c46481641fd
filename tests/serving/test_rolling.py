# SPDX-License-Identifier: Apache-2.0
"""Several servers go to one cut together: all of them, or none as long as one cannot."""

import pytest
import serving_rig
from fleet_rig import Asked, both, check

from oarlock.proto.errors import InvalidArgument, NotFound, PSError, Unavailable
from oarlock.proto.serving_pb2 import ModelReply, ModelVersion
from oarlock.serving.rolling import common_cut


@pytest.fixture(params=["blocking", "asyncio"])
def kind(request):
    return request.param


@pytest.fixture
def fleet(model, servers):
    """Two replicas of each of two parts at cut 3 of cuts 1 to 3."""
    for cut in (2, 3):
        model.cut(cut)
    return servers.parts(model.store, 2, replicas=2)


def cuts_of(fleet):
    return [each.serving.current.version.cut for each in fleet]


def test_all_go_back_together_and_to_the_newest_again(model, fleet, kind):
    with Asked(kind, [each.address for each in fleet]) as client:
        for wanted in (2, 1):
            told = client.rollback()
            assert (told.version.cut, told.pinned, told.parts, list(told.cuts)) == (wanted, True, 2, [1, 2, 3])
            assert sum(table.rows for table in told.tables) == 400, "of each part one server counts"
            assert cuts_of(fleet) == [wanted] * 4
            check(client.lookup(both(model.keys)), model, model.keys, wanted)
        with pytest.raises(NotFound, match="no cut that all 4 servers have is older than 1"):
            client.rollback()
        assert client.rollback(3).version.cut == 3
        assert client.rollback(2).pinned
        told = client.rollback(newest=True)
        assert (told.version.cut, told.pinned) == (3, False)
        assert cuts_of(fleet) == [3] * 4


def test_servers_of_several_cuts_go_to_one_that_is_older_than_all(fleet, kind):
    fleet[2].serving.roll_back(2)
    with Asked(kind, [each.address for each in fleet]) as client:
        assert client.rollback().version.cut == 1
    assert cuts_of(fleet) == [1] * 4


def test_nobody_is_told_what_one_cannot_do(fleet, kind):
    with Asked(kind, [each.address for each in fleet], timeout_seconds=5) as client:
        with pytest.raises(NotFound, match=f"{fleet[0].address} has no cut 9: no server was told anything"):
            client.rollback(9)
        assert cuts_of(fleet) == [3] * 4
        fleet[3].stop()
        with pytest.raises(Unavailable, match=f"no server was told anything: {fleet[3].address} does not say"):
            client.rollback(timeout_seconds=2)
        assert cuts_of(fleet) == [3] * 4


def test_a_set_that_lacks_a_part_is_refused(fleet, kind):
    """Parts that are not told would serve another cut for good, and clients of all would have no version."""
    wrong = "none of 2 servers has part 1 of 2: give the addresses of all parts"
    with Asked(kind, [each.address for each in fleet[:2]]) as client, pytest.raises(InvalidArgument, match=wrong):
        client.rollback(2)
    assert cuts_of(fleet) == [3] * 4


def test_who_fails_in_between_is_named_and_can_be_told_again(fleet, kind, monkeypatch):
    real = fleet[1].serving.roll_back

    def fails(cut):
        raise Unavailable("the disk is away")

    monkeypatch.setattr(fleet[1].serving, "roll_back", fails)
    with Asked(kind, [each.address for each in fleet]) as client:
        words = f"3 of 4 servers serve cut 2, {fleet[1].address} does not: .*the disk is away; ask again for cut 2"
        with pytest.raises(PSError, match=words):
            client.rollback()
        assert cuts_of(fleet) == [2, 3, 2, 2]
        monkeypatch.setattr(fleet[1].serving, "roll_back", real)
        assert client.rollback(2).version.cut == 2
    assert cuts_of(fleet) == [2] * 4


def test_servers_of_other_jobs_are_refused(fleet, servers, tmp_path, kind):
    other = serving_rig.Model(tmp_path / "other", job="f" * 32)
    other.cut(1)
    stranger = servers.start(other.store)
    words = f"{stranger.address} and {fleet[0].address} do not go together"
    with Asked(kind, [fleet[0].address, stranger.address]) as client, pytest.raises(InvalidArgument, match=words):
        client.rollback()
    assert cuts_of([fleet[0], stranger]) == [3, 1]


@pytest.mark.parametrize(
    ("served", "cuts", "cut", "expected"),
    [
        ((5, 5), ((1, 3, 5), (1, 3, 5)), 0, 3),
        ((5, 5), ((1, 3, 5), (1, 4, 5)), 0, 1),
        ((5, 3), ((1, 3, 5), (1, 3, 5)), 0, 1),
        ((5, 3), ((1, 3, 5), (1, 3, 5)), 5, 5),
        ((5, 5), ((1, 3), (4, 5)), 0, None),
        ((5, 5), ((1, 3, 5), (1, 5)), 3, None),
    ],
)
def test_the_cut_that_all_have(served, cuts, cut, expected):
    told = {
        f"a:{i}": ModelReply(version=ModelVersion(cut=at), cuts=have)
        for i, (at, have) in enumerate(zip(served, cuts, strict=True))
    }
    if expected is not None:
        assert common_cut(told, cut) == expected
        return
    with pytest.raises(NotFound):
        common_cut(told, cut)
