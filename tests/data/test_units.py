import numpy as np
import pytest

from cliptune.data.near_duplicates import NearDuplicates
from cliptune.data.table import SPLITS, Strings
from cliptune.data.units import components, crossing, find_units, row_split_leaks


def copies(near: list[tuple[int, int]], identical: list[tuple[int, int]] | None = None) -> NearDuplicates:
    pairs = np.array([*(identical or []), *near], dtype=np.int64).reshape(-1, 2)
    same = np.arange(len(pairs)) < len(identical or [])
    return NearDuplicates(pairs, same, np.zeros(len(pairs), dtype=np.float32))


def plain_components(size: int, edges: np.ndarray) -> list[int]:
    """By walking from each node."""
    reached = list(range(size))
    for start in range(size):
        seen, waiting = {start}, [start]
        while waiting:
            node = waiting.pop()
            for a, b in edges.tolist():
                for other in {a, b} - seen if node in {a, b} else ():
                    seen.add(other)
                    waiting.append(other)
        reached[start] = min(seen)
    return reached


@pytest.mark.parametrize("seed", range(30))
def test_components_are_those_of_a_walk(seed: int) -> None:
    rng = np.random.default_rng(seed)
    size = int(rng.integers(1, 40))
    edges = rng.integers(0, size, (int(rng.integers(0, size)), 2))
    assert components(size, edges).tolist() == plain_components(size, edges)


def test_a_long_chain_is_one_component() -> None:
    order = np.random.default_rng(0).permutation(5000)
    assert (components(5000, np.stack([order[1:], order[:-1]], axis=1)) == 0).all()


def test_units_are_groups_with_their_copies() -> None:
    groups = Strings.of(["b", "a", "b", "c", "d", "e"])
    assert find_units(groups, copies([])).of.tolist() == [1, 0, 1, 2, 3, 4]
    joined = find_units(groups, copies([(0, 4)], identical=[(1, 3)]))
    assert joined.of.tolist() == [1, 0, 1, 0, 1, 4] and not joined.lumps
    assert find_units(groups, copies([(0, 4)], identical=[(1, 3)]), join=False).of.tolist() == [1, 0, 1, 0, 3, 4]


def test_a_lump_of_look_alikes_is_told_and_not_joined() -> None:
    groups = Strings.of(f"{i:04}" for i in range(500))
    chain = [(i, i + 1) for i in range(10)]  # 11 images, where 10 are allowed
    found = find_units(groups, copies([*chain, (100, 101)], identical=[(3, 7)]))
    assert [lump.tolist() for lump in found.lumps] == [list(range(11))]
    assert found.of[3] == found.of[7]  # the same file, lump or not
    assert found.of[100] == found.of[101]
    assert len(np.unique(found.of)) == 500 - 2
    assert not find_units(groups, copies(chain[:9])).lumps
    # a large group is no lump for holding copies of its own
    one_group = Strings.of(["g"] * 50 + [f"{i:04}" for i in range(450)])
    found = find_units(one_group, copies([(0, 1), (2, 3), (60, 61)]))
    assert not found.lumps and found.of[60] == found.of[61]


def test_two_large_groups_with_one_copy_are_joined() -> None:
    groups = Strings.of(["a"] * 6 + ["b"] * 6 + [f"{i:04}" for i in range(400)])
    found = find_units(groups, copies([(0, 6)]))
    assert not found.lumps
    assert len(np.unique(found.of[:12])) == 1 and len(np.unique(found.alone[:12])) == 2


def test_of_a_lump_the_look_alikes_are_named_and_not_their_groups() -> None:
    groups = Strings.of([name for i in range(12) for name in (f"g{i}",) * 3])
    found = find_units(groups, copies([(3 * i, 3 * i + 3) for i in range(11)]))
    assert [lump.tolist() for lump in found.lumps] == [list(range(0, 36, 3))]


def test_images_on_several_sides_are_told() -> None:
    train, val, test = range(len(SPLITS))
    splits = np.array([train, val, train, train, test], dtype=np.int8)
    assert crossing(np.array([0, 0, 1, 1, 2]), splits).tolist() == [0, 1]
    assert crossing(np.array([0, 1, 2, 2, 0]), splits).tolist() == [0, 4]
    assert not len(crossing(np.arange(5), splits))


@pytest.mark.slow
def test_leaks_of_a_split_by_row_are_what_drawing_gives() -> None:
    units = np.array([0, 0, 0, 1, 1, *range(2, 20)])
    rng, total = np.random.default_rng(0), 0
    for _ in range(4000):
        is_val = np.isin(np.arange(len(units)), rng.permutation(len(units))[:6])
        total += np.isin(units[is_val], units[~is_val]).sum()
    assert row_split_leaks(units, 6) == pytest.approx(total / 4000, rel=0.05)
    assert row_split_leaks(np.arange(50), 6) == 0
