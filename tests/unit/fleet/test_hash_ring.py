from __future__ import annotations

from collections import Counter

from xgen_proxy.fleet.hash_ring import HashRing, ring_of


def names(count: int) -> list[str]:
    return [f"m{n}" for n in range(count)]


def walk(names: list[str], key: str) -> list[str]:
    return [names[index] for index in HashRing(names).walk(key)]


def test_walk_yields_each_name_once_whatever_their_order() -> None:
    found = walk(names(7), "key")
    assert sorted(found) == names(7)
    assert found == walk(names(7)[::-1], "key")


def test_removing_a_name_keeps_the_order_of_the_others() -> None:
    for key in map(str, range(50)):
        assert [name for name in walk(names(7), key) if name != "m6"] == walk(names(6), key)


def test_keys_are_spread() -> None:
    ring = HashRing(names(8))
    homes = Counter(next(ring.walk(str(key))) for key in range(8000))
    assert len(homes) == 8
    assert max(homes.values()) < 2 * min(homes.values()), homes


def test_empty_ring_and_surrogate_keys() -> None:
    assert walk([], "key") == []
    assert len(walk(names(2), "\ud800")) == 2


def test_rings_of_the_same_names_are_shared() -> None:
    assert ring_of(("a", "b")) is ring_of(("a", "b"))
    assert ring_of(("a", "b")) is not ring_of(("b", "a"))
