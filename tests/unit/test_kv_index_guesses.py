"""The approximation against pools that say nothing, and the audit that notices when it is wrong."""

from __future__ import annotations

import gzip
import hashlib
import json
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from penstock.engine.scheduler.block_pool import BlockPool
from penstock.protocol.kv import BLOCK_TOKENS, KEY_BYTES, split_keys
from penstock.service.kv_index.approximate import ApproximateIndex, SentKeys
from penstock.service.kv_index.audit import HitAudit

SLICE = Path(__file__).parents[1] / "data" / "mooncake_slice.jsonl.gz"


def chain(name: object, count: int) -> bytes:
    return b"".join(
        hashlib.sha256(f"{name}/{n}".encode()).digest()[:KEY_BYTES] for n in range(count)
    )


def test_what_was_sent_is_taken_for_cached() -> None:
    index = ApproximateIndex()
    index.add("a", 100)
    index.add("b", 100)
    keys = chain("x", 10)
    index.sent("a", keys[: 6 * KEY_BYTES])
    index.sent("nobody", keys)
    tokens, same = index.hits(keys, ["b", "a", "nobody"])
    assert tokens.tolist() == [0, 6 * BLOCK_TOKENS, 0] and (same == tokens).all()
    index.add("a", 100)  # it has started anew
    assert not index.hits(keys, ["a"])[0].any()
    index.drop("b")
    assert index.num_blocks("b") == 0


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 12)), max_size=40))
def test_it_is_an_lru_of_chains(sends: list[tuple[int, int]]) -> None:
    sent = SentKeys(20)
    order: list[bytes] = []
    for name, count in sends:
        keys = split_keys(chain(name, count))
        sent.sent(keys)
        order = [k for k in order if k not in keys] + keys[::-1]
        order = order[-20:]
        assert len(sent) == len(order)
    for name in range(6):
        keys = split_keys(chain(name, 12))
        there = [key in order for key in keys]
        assert sent.leading(keys) == (there.index(False) if False in there else 12)


def test_alone_on_a_pool_of_the_right_size_the_guess_is_what_the_pool_finds() -> None:
    with gzip.open(SLICE, "rt", encoding="utf-8") as lines:
        trace = [json.loads(line) for line in lines][:300]
    index = ApproximateIndex()
    index.add("a", 2000)
    pool = BlockPool(2000)
    audit = HitAudit()
    for ids in trace:
        keys = [hashlib.sha256(b"%d" % i).digest()[:KEY_BYTES] for i in ids]
        guess = int(index.hits(b"".join(keys), ["a"])[0][0])
        blocks = pool.match(keys)
        audit.observe("a", guess, len(blocks) * BLOCK_TOKENS, len(keys) * BLOCK_TOKENS)
        for block in blocks:
            pool.share(block)
        for i in range(len(blocks), len(keys)):
            blocks.append(
                pool.register(pool.allocate(), keys[i], keys[i - 1] if i else b"", public=True)
            )
        pool.release(blocks)
        index.sent("a", b"".join(keys))
    account = audit.accounts()["a"]
    assert account.actual_tokens > 0
    assert account.error_tokens <= 0.05 * account.actual_tokens
    assert audit.trusts("a")


def test_an_index_that_is_wrong_is_not_believed_until_it_is_right_again() -> None:
    audit = HitAudit()
    for _ in range(7):
        audit.observe("a", 1000, 0, 1000)
    assert audit.trusts("a"), "a few misses prove nothing"
    audit.observe("a", 1000, 0, 1000)
    assert not audit.trusts("a") and audit.trusts("b")
    assert audit.accounts()["a"].bias == 1.0
    turns = 0
    while not audit.trusts("a"):
        audit.observe("a", 500, 500, 1000)
        turns += 1
    assert 5 < turns < 30
    audit.observe("a", 0, 1000, 1000)
    assert audit.trusts("a") and audit.accounts()["a"].bias < 0.2
    audit.drop("a")
    assert audit.accounts() == {}
