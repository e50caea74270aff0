"""Attention against float64: the reference in torch, and the CPU kernels in every build.

KV pools are filled with NaN and so is freshly allocated output, so that a key read too far or an
output not written cannot hide.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import pytest
import torch
from torch.nn import functional

from penstock.engine.attention import select
from penstock.engine.attention.base import AttentionRow, AttentionShape
from penstock.engine.attention.cpu_native import HEAD_DIMS, NativeCpuAttention
from penstock.engine.attention.reference import ReferenceAttention, attend
from penstock.engine.memory.contiguous import ContiguousMemory
from penstock.engine.memory.paged import PagedMemory
from penstock.engine.memory.sizing import kv_layout
from penstock.engine.memory.xtensor import XTensorMemory
from penstock.engine.platforms.cpu import kernels
from penstock.protocol.errors import ConfigError

CPU = torch.device("cpu")
LAYER = 1
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 0.03}

needs_compiler = pytest.mark.skipif(kernels.load() is None, reason="needs a C++ compiler")


@pytest.fixture(params=["native", "haswell", "x86-64"])
def library(request, monkeypatch):
    """The kernels as built for this machine, for one with AVX2 only, and for any x86-64."""
    if request.param != "native" and not torch.backends.mkldnn.is_available():
        pytest.skip("not an x86 machine")

    def load_attention(head_dim):
        return kernels.open_library(kernels.build(request.param, part=kernels.attention(head_dim)))

    monkeypatch.setattr(kernels, "load_attention", load_attention)


@dataclass
class Case:
    """Rows with random histories in a poisoned pool, and what they ask in this step."""

    shape: AttentionShape
    memory: object
    rows: list[AttentionRow]
    q: torch.Tensor  # [T, H, D]
    k: torch.Tensor  # [T, G, D]
    v: torch.Tensor

    def expected(self) -> torch.Tensor:
        """In float64, from what the memory holds after the step."""
        parts, first = [], 0
        for row in self.rows:
            k_GSD, v_GSD = self.memory.read(row.slot, row.start + row.num_tokens, LAYER)
            q_THD = self.q[first : first + row.num_tokens].double()
            parts.append(attend(self.shape, q_THD, k_GSD.double(), v_GSD.double(), row.start))
            first += row.num_tokens
        return torch.cat(parts)

    def assert_stored(self) -> None:
        """Bit by bit; what is rounded to int8 lies within half a step of its scale."""
        half_a_step = 0.51 / 127 if self.memory.layout.dtype == "int8" else 0.0
        first = 0
        for row in self.rows:
            k_GSD, v_GSD = self.memory.read(row.slot, row.start + row.num_tokens, LAYER)
            here = slice(first, first + row.num_tokens)
            for found_GSD, x_TGD in ((k_GSD, self.k), (v_GSD, self.v)):
                x_GTD = x_TGD[here].transpose(0, 1).to(found_GSD.dtype)
                error_GTD = (found_GSD[:, row.start :] - x_GTD).abs()
                assert (error_GTD <= x_GTD.abs().amax(-1, keepdim=True) * half_a_step).all()
            first += row.num_tokens


def make_case(
    seed: int,
    dtype: torch.dtype,
    memory_class: type = XTensorMemory,
    *,
    heads: tuple[int, int] | None = None,
    head_dim: int | None = None,
    window: int | None = None,
    lengths: list[tuple[int, int]] | None = None,
    kv_dtype: str | None = None,
) -> Case:
    rng, gen = random.Random(seed), torch.Generator().manual_seed(seed)
    kv_heads = rng.choice((1, 2, 3))
    num_heads, kv_heads = heads or (kv_heads * rng.choice((1, 2, 4, 5)), kv_heads)
    dim = head_dim or rng.choice(HEAD_DIMS)
    lengths = lengths or [
        (
            rng.choice((0, 3, 16, rng.randrange(300))),
            rng.choice((1, 1, 2, 9, rng.randrange(1, 150))),
        )
        for _ in range(4)
    ]
    layout = kv_layout(2, kv_heads, dim, kv_dtype or dtype)
    needed = [-(-(start + num) // 16) for start, num in lengths]
    memory = memory_class(layout, sum(needed) + 3, len(lengths) + 1, max(needed))
    pool = memory.pool_blocks()
    poison(pool)
    free = list(range(sum(needed) + 3))
    rng.shuffle(free)
    rows = []
    for slot, (start, num_tokens) in enumerate(lengths):
        for index in range(needed[slot]):
            memory.map(slot, index, free.pop())
        if memory_class is ContiguousMemory:
            poison(memory.slot_blocks(slot, needed[slot]))
        past = torch.randn(2, start, kv_heads, dim, generator=gen).to(dtype)
        if start:
            memory.write(slot, 0, LAYER, past[0], past[1])
        rows.append(AttentionRow(slot, start, num_tokens))
    rng.shuffle(rows)
    num_tokens = sum(row.num_tokens for row in rows)
    # As a fused qkv gives them: heads together, tokens apart.
    qkv = torch.randn(num_tokens, num_heads + 2 * kv_heads, dim, generator=gen).to(dtype)
    q, k, v = qkv.split((num_heads, kv_heads, kv_heads), dim=1)
    shape = AttentionShape(num_heads, kv_heads, dim, dim**-0.5, window)
    return Case(shape, memory, rows, q, k, v)


def poison(blocks: torch.Tensor) -> None:
    """NaN; in int8 all bits set, which makes scales NaN."""
    blocks.fill_(float("nan") if blocks.dtype.is_floating_point else -1)


def run(backend_class: type, case: Case, monkeypatch) -> torch.Tensor:
    """Out of a buffer of NaN: what the kernel leaves out stays one."""
    backend = backend_class(case.shape, case.memory)
    backend.plan(case.rows)
    with monkeypatch.context() as patched:
        poisoned = lambda size, **options: torch.full(size, float("nan"), **options)  # noqa: E731
        patched.setattr(torch, "empty", poisoned)
        return backend.run(LAYER, case.q, case.k, case.v)


def assert_right(backend_class: type, case: Case, monkeypatch) -> None:
    out_THD = run(backend_class, case, monkeypatch)
    case.assert_stored()
    assert out_THD.dtype == case.q.dtype and out_THD.shape == case.q.shape
    error = (out_THD.double() - case.expected()).abs().max().item()
    assert error < TOLERANCE[case.q.dtype], case.rows


def test_attend_agrees_with_torch():
    gen = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(n, t, 16, generator=gen) for n, t in ((6, 9), (2, 9), (2, 9)))
    shape = AttentionShape(6, 2, 16, 0.3)
    expected = functional.scaled_dot_product_attention(
        q[None], k[None], v[None], is_causal=True, scale=0.3, enable_gqa=True
    )[0]
    found = attend(shape, q.transpose(0, 1), k, v, 0).transpose(0, 1)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    for start in (1, 5, 8):  # the last rows alone give the same rows
        part = attend(shape, q.transpose(0, 1)[start:], k, v, start)
        torch.testing.assert_close(part.transpose(0, 1), expected[:, start:], rtol=1e-5, atol=1e-6)


def test_a_window_sees_its_own_position_and_those_just_before():
    k_GSD = torch.zeros(1, 6, 16)
    v_GSD = torch.arange(6.0).view(1, 6, 1).expand(1, 6, 16)
    shape = AttentionShape(1, 1, 16, 1.0, sliding_window=3)
    out_THD = attend(shape, torch.ones(6, 1, 16), k_GSD, v_GSD, 0)
    assert out_THD[:, 0, 0].tolist() == [0.0, 0.5, 1.0, 2.0, 3.0, 4.0]


@pytest.mark.parametrize("memory_class", [XTensorMemory, ContiguousMemory, PagedMemory])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_reference(dtype, memory_class, monkeypatch):
    for seed in range(4):
        case = make_case(seed, dtype, memory_class, window=(None, 20)[seed % 2])
        assert_right(ReferenceAttention, case, monkeypatch)
        case.memory.close()


@needs_compiler
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_native_on_random_batches(library, dtype, monkeypatch):
    for seed in range(12):
        case = make_case(seed, dtype, window=(None, None, 7, 40, 200)[seed % 5])
        assert_right(NativeCpuAttention, case, monkeypatch)
        case.memory.close()


@pytest.mark.parametrize("memory_class", [XTensorMemory, ContiguousMemory, PagedMemory])
def test_reference_with_kv_in_fewer_bits(memory_class, monkeypatch):
    for kv_dtype in ("int8", "bfloat16"):
        case = make_case(7, torch.float32, memory_class, kv_dtype=kv_dtype)
        assert_right(ReferenceAttention, case, monkeypatch)
        case.memory.close()


@needs_compiler
@pytest.mark.parametrize("kv_dtype", ["int8", "bfloat16"])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_native_with_kv_in_fewer_bits(library, dtype, kv_dtype, monkeypatch):
    """Against the same values in float64: only the storing rounds."""
    for seed in range(8):
        window = (None, None, 30)[seed % 3]
        case = make_case(seed, dtype, window=window, kv_dtype=kv_dtype)
        assert_right(NativeCpuAttention, case, monkeypatch)
        case.memory.close()


@needs_compiler
def test_int8_is_stored_as_torch_would_store_it(monkeypatch):
    stored = []
    for backend in (NativeCpuAttention, ReferenceAttention):
        case = make_case(11, torch.bfloat16, kv_dtype="int8", lengths=[(5, 40), (0, 1), (30, 2)])
        run(backend, case, monkeypatch)
        ends = [row.start + row.num_tokens for row in case.rows]
        found = [
            case.memory.read(row.slot, end, LAYER) for row, end in zip(case.rows, ends, strict=True)
        ]
        stored.append([x.clone() for pair in found for x in pair])
        case.memory.close()
    for native, reference in zip(*stored, strict=True):  # but for values halfway between two steps
        step_GS1 = reference.abs().amax(-1, keepdim=True) / 127
        assert ((native - reference).abs() <= 1.01 * step_GS1).all()
        assert ((native - reference).abs() > 0.01 * step_GS1).float().mean() < 1e-2


@needs_compiler
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_int8_stays_near_what_unrounded_kv_gives(dtype, monkeypatch):
    """Normal data, 1,000 keys: the output is off by a few thousandths."""
    outs = []
    for kv_dtype in ("int8", None):
        case = make_case(
            4, dtype, heads=(8, 4), head_dim=128, lengths=[(1000, 1), (0, 500)], kv_dtype=kv_dtype
        )
        outs.append((run(NativeCpuAttention, case, monkeypatch), case.rows))
        case.memory.close()
    (int8, rows), (exact, same_rows) = outs
    assert rows == same_rows
    error = (int8 - exact).float().norm() / exact.float().norm()
    assert 0 < error < 0.012


def test_layouts_of_different_kv_dtypes_differ():
    layouts = [kv_layout(2, 2, 64, dtype) for dtype in ("float32", "bfloat16", "int8")]
    assert len({layout.digest() for layout in layouts}) == 3
    assert [layout.block_bytes for layout in layouts] == [
        8192 * 4, 8192 * 2, 8192 + 4 * 2 * 2 * 2 * 16
    ]  # fmt: skip


@needs_compiler
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_native_takes_every_head_dim_it_names(head_dim, dtype, monkeypatch):
    case = make_case(1, dtype, head_dim=head_dim, lengths=[(40, 1), (0, 37)])
    assert_right(NativeCpuAttention, case, monkeypatch)
    case.memory.close()


@needs_compiler
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(
    "lengths",
    [
        [(0, 1)],  # the first token of all
        [(15, 1), (16, 1), (17, 1)],  # around a block's end
        [(0, 16), (0, 17), (16, 16)],
        [(1100, 1)],  # several stretches that are joined
        [(1100, 1), (3, 1)],
        [(700, 3)],  # few queries over many keys
        [(63, 64), (64, 64), (65, 127)],  # around a tile
        [(0, 300)],
    ],
    ids=str,
)
def test_native_at_borders(lengths, dtype, monkeypatch):
    for heads in ((4, 2), (3, 1), (2, 2)):
        case = make_case(2, dtype, heads=heads, head_dim=64, lengths=lengths)
        assert_right(NativeCpuAttention, case, monkeypatch)
        case.memory.close()


@needs_compiler
def test_a_window_across_stretches_and_tiles(monkeypatch):
    for window in (1, 16, 100, 5000):
        lengths = [(900, 1), (400, 200), (0, 90), (10, 3)]
        case = make_case(5, torch.float32, head_dim=32, window=window, lengths=lengths)
        assert_right(NativeCpuAttention, case, monkeypatch)
        case.memory.close()


@needs_compiler
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_large_scores_neither_overflow_nor_vanish(dtype, monkeypatch):
    case = make_case(3, dtype, head_dim=64, lengths=[(200, 1), (0, 80)])
    case.q.mul_(100)  # scores of hundreds: a softmax of one key
    assert_right(NativeCpuAttention, case, monkeypatch)
    case.q.zero_()  # all alike: a mean
    assert_right(NativeCpuAttention, case, monkeypatch)
    case.memory.close()


@needs_compiler
def test_any_number_of_threads_is_right(monkeypatch):
    """Stretches of context depend on the number of threads; the answer does not."""
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            lengths = [(1100, 1), (600, 2), (30, 100), (0, 200)]
            case = make_case(4, torch.float32, heads=(8, 2), head_dim=32, lengths=lengths)
            assert_right(NativeCpuAttention, case, monkeypatch)
            case.memory.close()
    finally:
        torch.set_num_threads(before)


@needs_compiler
def test_shared_prefix_gives_what_its_own_copy_gives(monkeypatch):
    """Two slots, one set of blocks for the first 32 tokens: the same bits as two copies."""
    layout = kv_layout(2, 2, 32, "float32")
    shape = AttentionShape(4, 2, 32, 0.2)
    gen = torch.Generator().manual_seed(1)
    k, v = torch.randn(2, 32, 2, 32, generator=gen)
    q_THD, new_k, new_v = (torch.randn(2, h, 32, generator=gen) for h in (4, 2, 2))
    outs = []
    for blocks in ([[0, 1, 2], [0, 1, 3]], [[0, 1, 2], [4, 5, 3]]):
        memory = XTensorMemory(layout, 6, 2, 3)
        for slot in (0, 1):
            for index, block in enumerate(blocks[slot]):
                memory.map(slot, index, block)
        memory.write(0, 0, LAYER, k, v)
        memory.write(1, 0, LAYER, k, v)
        backend = NativeCpuAttention(shape, memory)
        backend.plan([AttentionRow(0, 32, 1), AttentionRow(1, 32, 1)])
        outs.append(backend.run(LAYER, q_THD, new_k, new_v))
        memory.close()
    assert torch.equal(*outs)


def test_backends_say_why_they_cannot():
    shape = AttentionShape(4, 2, 20, 1.0)
    answers = select.refusals(shape, torch.float32, CPU)
    assert "head_dim 20 is not one of" in answers["cpu_native"]
    assert answers["reference"] is None
    assert select.choose(shape, torch.float32, CPU) is ReferenceAttention
    even = AttentionShape(4, 2, 64, 1.0)
    assert "float16" in select.refusals(even, torch.float16, CPU)["cpu_native"]
    assert "cuda" in select.refusals(even, torch.float32, torch.device("cuda"))["cpu_native"]
    with pytest.raises(ConfigError, match="cpu_native cannot run here: head_dim 20"):
        select.choose(shape, torch.float32, CPU, "cpu_native")
    with pytest.raises(ConfigError, match="choose from auto, cpu_native, reference"):
        select.choose(shape, torch.float32, CPU, "flash")


def test_without_kernels_auto_is_the_reference(monkeypatch):
    monkeypatch.setattr(kernels, "load", lambda: None)
    shape = AttentionShape(4, 2, 64, 1.0)
    assert "could not be compiled" in select.refusals(shape, torch.float32, CPU)["cpu_native"]
    assert select.choose(shape, torch.float32, CPU) is ReferenceAttention


@needs_compiler
def test_the_chosen_one_is_native_on_this_machine():
    assert select.choose(AttentionShape(16, 8, 128, 0.1), torch.bfloat16, CPU) is NativeCpuAttention


@needs_compiler
@pytest.mark.parametrize("kv_dtype", [None, "int8"])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_a_rows_bits_depend_neither_on_threads_nor_on_other_rows(dtype, kv_dtype, monkeypatch):
    lengths = [(1100, 1), (600, 1), (30, 100), (0, 1), (250, 3)]
    case = make_case(6, dtype, heads=(6, 3), head_dim=64, lengths=lengths, kv_dtype=kv_dtype)
    backend = NativeCpuAttention(case.shape, case.memory)
    before, together = torch.get_num_threads(), None
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            backend.plan(case.rows)
            out_THD = backend.run(LAYER, case.q, case.k, case.v)
            together = out_THD if together is None else together
            assert torch.equal(out_THD, together)
    finally:
        torch.set_num_threads(before)
    first = 0
    for row in case.rows:
        here = slice(first, first + row.num_tokens)
        first += row.num_tokens
        backend.plan([row])
        alone = backend.run(LAYER, case.q[here], case.k[here], case.v[here])
        assert torch.equal(alone, together[here])
    case.memory.close()


@needs_compiler
@pytest.mark.parametrize("window", [None, 70])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_prefill_in_chunks_of_many_queries_gives_the_same_bits(dtype, window, monkeypatch):
    """Of more than 8 queries for each kv head (`kFewQueries`), that is: a shorter remainder goes
    through the decode kernel, which rounds differently."""
    case = make_case(8, dtype, heads=(4, 2), head_dim=64, window=window, lengths=[(0, 300)])
    backend = NativeCpuAttention(case.shape, case.memory)
    backend.plan(case.rows)
    whole = backend.run(LAYER, case.q, case.k, case.v)
    parts = []
    for start, end in ((0, 100), (100, 117), (117, 300)):
        here = slice(start, end)
        backend.plan([AttentionRow(case.rows[0].slot, start, end - start)])
        parts.append(backend.run(LAYER, case.q[here], case.k[here], case.v[here]))
    assert torch.equal(torch.cat(parts), whole)
    case.memory.close()
