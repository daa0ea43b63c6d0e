from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from xgen_proxy.fleet.hash_ring import HashRing


@dataclass
class Member:
    name: str


def members(count: int) -> list[Member]:
    return [Member(f"m{n}") for n in range(count)]


def names(ring: HashRing[Member], key: str) -> list[str]:
    return [member.name for member in ring.walk(key)]


def test_a_walk_meets_each_member_once_whatever_order_they_were_given_in() -> None:
    walk = names(HashRing(members(7)), "key")
    assert sorted(walk) == [f"m{n}" for n in range(7)]
    assert walk == names(HashRing(members(7)[::-1]), "key")


def test_one_that_goes_leaves_the_others_in_their_order() -> None:
    before, after = HashRing(members(7)), HashRing(members(6))
    for key in map(str, range(50)):
        assert [name for name in names(before, key) if name != "m6"] == names(after, key)


def test_keys_are_spread() -> None:
    ring = HashRing(members(8))
    homes = Counter(names(ring, str(key))[0] for key in range(8000))
    assert len(homes) == 8
    assert max(homes.values()) < 2 * min(homes.values()), homes


def test_nobody_there_and_keys_that_are_no_text() -> None:
    assert names(HashRing([]), "key") == []
    assert len(names(HashRing(members(2)), "\ud800")) == 2
