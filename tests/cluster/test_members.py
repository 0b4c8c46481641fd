# SPDX-License-Identifier: Apache-2.0
"""Members: leases are renewed in time or lost for good; nobody pays for the coordinator's own absence."""

import pytest

from oarlock.cluster.members import Member, Members
from oarlock.proto.errors import LeaseLost


def member(incarnation: int, id: int = 0, role: str = "worker", nonce: int = 0) -> Member:
    return Member(incarnation, id, role, "", nonce or incarnation, 1, "host", "arrow")


def test_a_lease_lasts_while_it_is_renewed() -> None:
    members = Members(5.0)
    members.add(member(1), 100.0)
    for now in (104.0, 108.0, 112.0):
        assert members.expired(now) == []
        members.renew(1, now)
    assert members.expired(117.0) == []
    assert [m.incarnation for m in members.expired(117.1)] == [1]


def test_a_lease_that_ended_is_not_renewed() -> None:
    members = Members(5.0)
    members.add(member(1), 0.0)
    members.all[1].state = "dead"
    with pytest.raises(LeaseLost, match="not a member any more: dead: join anew"):
        members.renew(1, 1.0)
    with pytest.raises(LeaseLost, match="incarnation 9 is not a member: join anew"):
        members.renew(9, 1.0)
    assert members.expired(1e9) == []
    assert members.lost() == [members.all[1]]


def test_after_a_pause_everybody_has_a_full_term() -> None:
    members = Members(5.0)
    members.add(member(1), 0.0)
    members.add(member(2, 1), 998.0)
    members.grant_full_term(1000.0)
    assert members.expired(1005.0) == []
    assert len(members.expired(1005.1)) == 2


def test_a_full_term_shortens_no_lease() -> None:
    members = Members(5.0)
    members.add(member(1), 10.0)
    members.grant_full_term(3.0)
    assert members.expired(15.0) == []


def test_numbers_of_members_that_are_gone_are_used_again() -> None:
    members = Members(5.0)
    for i in range(3):
        members.add(member(10 + i, members.next_id("shard"), "shard"), 0.0)
    assert members.next_id("shard") == 3
    assert members.next_id("worker") == 0
    members.all[11].state = "left"
    assert members.next_id("shard") == 1


def test_a_repeated_join_finds_the_living_member_of_its_role() -> None:
    members = Members(5.0)
    members.add(member(1, nonce=77), 0.0)
    assert members.by_nonce("worker", 77) is members.all[1]
    assert members.by_nonce("shard", 77) is None
    members.all[1].state = "dead"
    assert members.by_nonce("worker", 77) is None
    members.add(member(2, nonce=77), 0.0)
    assert members.by_nonce("worker", 77) is members.all[2]


def test_the_record_leaves_out_what_does_not_last() -> None:
    made = member(5, id=2, role="shard")
    made.stats, made.told, made.expires = {"rows": 1}, 8.0, 9.0
    record = made.record()
    assert "stats" not in record
    assert "told" not in record
    assert "expires" not in record
    again = Member(**record)
    assert (again.incarnation, again.id, again.role, again.state) == (5, 2, "shard", "alive")
