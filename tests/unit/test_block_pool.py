"""Blocks are never lost, never shared by accident, and go in the right order."""

from __future__ import annotations

import gc
import sys
from types import FrameType

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from penstock.engine.scheduler.block_pool import BlockPool
from penstock.engine.scheduler.reusable import Reusable
from penstock.protocol.kv import KvChange, block_keys, root_key, split_keys


def keys_of(ids: list[int], block_tokens: int = 1) -> list[bytes]:
    return split_keys(block_keys(root_key("pool"), ids, block_tokens))


def store(pool: BlockPool, ids: list[int], public: bool = True) -> list[int]:
    """Take the cached prefix of `ids`, compute the rest, one block a token; hold it all."""
    keys = keys_of(ids)
    blocks = pool.match(keys)
    for block in blocks:
        pool.share(block)
    for i in range(len(blocks), len(keys)):
        parent = keys[i - 1] if i else b""
        blocks.append(pool.register(pool.allocate(), keys[i], parent, public))
    return blocks


def test_free_blocks_are_used_before_anything_is_evicted() -> None:
    pool = BlockPool(4)
    pool.release(store(pool, [1, 2]))
    pool.release([pool.allocate(), pool.allocate()])
    assert pool.num_keys == 2
    pool.allocate(), pool.allocate()
    assert pool.num_keys == 2
    pool.allocate()
    assert pool.num_keys == 1


def test_the_least_recently_used_leaf_goes_first() -> None:
    pool = BlockPool(5)
    pool.release(store(pool, [1, 2, 3]))
    pool.release(store(pool, [7, 8]))
    pool.release(store(pool, [1, 2]))  # touched again: only 3 is old now
    held = []
    expected_left = [[1, 2, 7, 8], [1, 2, 7], [1, 2], [1], []]
    for left in expected_left:
        held.append(pool.allocate())
        kept = [len(pool.match(keys_of(ids))) for ids in ([1, 2, 3], [7, 8])]
        assert kept == [sum(i < 4 for i in left), sum(i > 4 for i in left)]
        pool.check([held])


def test_allocating_more_than_there_is_is_a_bug() -> None:
    pool = BlockPool(1)
    pool.allocate()
    assert pool.num_available == 0
    with pytest.raises(AssertionError):
        pool.allocate()


def test_releasing_twice_is_a_bug() -> None:
    pool = BlockPool(2)
    block = pool.allocate()
    pool.release([block])
    with pytest.raises(AssertionError):
        pool.release([block])


def test_a_second_copy_is_merged_into_the_first() -> None:
    pool = BlockPool(4)
    first = store(pool, [1])
    copy = pool.allocate()
    assert pool.register(copy, keys_of([1])[0], b"", True) == first[0]
    pool.check([first, first])
    assert pool.num_available == 3
    pool.release(first)
    assert pool.match(keys_of([1])) == first


def test_what_is_of_no_further_use_is_free_at_once() -> None:
    pool = BlockPool(2)
    pool.release(store(pool, [1, 2], public=False), keep=False)
    assert (pool.num_keys, pool.num_reusable, pool.num_available) == (0, 0, 2)


def test_changes_are_told_in_order_and_private_keys_are_not() -> None:
    pool = BlockPool(2)
    one, two = keys_of([1])[0], keys_of([2])[0]
    pool.release(store(pool, [1]))
    pool.release(store(pool, [3], public=False))
    pool.release(store(pool, [2]))  # evicts 1
    assert pool.take_changes() == [
        KvChange("stored", one),
        KvChange("removed", one),
        KvChange("stored", two),
    ]
    pool.clear_keys()
    assert pool.take_changes() == [KvChange("cleared")] and pool.take_changes() == []
    assert pool.num_available == 2
    pool.check([])


def test_how_much_a_preemption_would_free() -> None:
    pool = BlockPool(8)
    a, b, c = (store(pool, ids) for ids in ([1, 2, 3], [1, 2, 4, 5], [6]))
    assert list(pool.freed_by([a, b, c], besides=[])) == [1, 5, 6]
    assert list(pool.freed_by([a, b, c], besides=b[:3])) == [1, 2, 3]
    pool.release(a)
    pool.release(b)
    hits = pool.match(keys_of([1, 2, 4, 9]))
    assert hits == b[:3] and pool.num_reusable_in(hits) == 3


@given(
    num_blocks=st.integers(1, 12),
    ops=st.lists(
        st.tuples(st.sampled_from(["store", "private", "scratch", "release"]), st.integers(0, 60)),
        max_size=60,
    ),
)
@settings(max_examples=200, deadline=None)
def test_every_block_is_accounted_for_whatever_happens(
    num_blocks: int, ops: list[tuple[str, int]]
) -> None:
    pool = BlockPool(num_blocks)
    held: list[list[int]] = []
    private: list[list[int]] = []
    for step, (op, number) in enumerate(ops):
        if op == "release" and number % 2 and private:
            pool.release(private.pop(), keep=number % 3 > 0)
        elif op == "release" and held:
            pool.release(held.pop(number % len(held)))
        elif op == "scratch" and pool.num_available:
            held.append([pool.allocate()])
        elif op == "private" and pool.num_available > number % 4:
            private.append(store(pool, [100 + step] * (1 + number % 4), public=False))
        elif op == "store":
            ids = [int(digit) for digit in f"{number:06b}"[: 1 + number % 6]]
            hits = pool.match(keys_of(ids))
            if len(ids) - len(hits) + pool.num_reusable_in(hits) <= pool.num_available:
                held.append(store(pool, ids))
        pool.check(held + private)
    for blocks in held + private:
        pool.release(blocks)
    pool.check([])
    assert pool.num_available == num_blocks


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["add", "remove", "take", "detain", "let_go"]), st.integers(0, 11)
        ),
        max_size=80,
    )
)
def test_detained_blocks_keep_their_place(steps: list[tuple[str, int]]) -> None:
    """The oracle is one list, looked through from its beginning."""
    reusable, lru, detained = Reusable(12), [], set()
    for op, block in steps:
        if op == "add" and block not in lru:
            reusable.add(block, block in detained)
            lru.append(block)
        elif op == "remove" and block in lru:
            reusable.remove(block)
            lru.remove(block)
        elif op == "take" and set(lru) - detained:
            expected = next(b for b in lru if b not in detained)
            assert reusable.take_oldest() == expected
            lru.remove(expected)
        elif op == "detain" and block in lru and block not in detained:
            reusable.detain(block)
            detained.add(block)
        elif op == "let_go":
            some = [b for b in sorted(detained) if b >= block]
            reusable.let_go(some)
            detained -= set(some)
        assert reusable.in_order() == lru and len(reusable) == len(lru)
        assert list(reusable.evictable()) == [b for b in lru if b not in detained]
        assert reusable.num_evictable == len(set(lru) - detained)
        assert all((b in reusable) == (b in lru) for b in range(12))


def test_what_is_being_stored_makes_nothing_slower() -> None:
    """In lines executed, which do not depend on the machine."""

    def num_lines(num_storing: int) -> int:
        pool = BlockPool(400)
        for number in range(400):
            pool.release(store(pool, [number]))
        pool.begin_store(pool.oldest(num_storing))
        lines = 0

        def count(frame: FrameType, event: str, arg: object) -> object:
            nonlocal lines
            lines += event == "line"
            return count

        before = sys.gettrace()
        gc.disable()  # whoever watches collections has lines of his own
        sys.settrace(count)
        try:
            for _ in range(20):
                assert pool.num_available
                pool.allocate()
        finally:
            sys.settrace(before)
            gc.enable()
        return lines

    assert num_lines(150) == num_lines(1)
