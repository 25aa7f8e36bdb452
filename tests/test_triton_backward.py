"""The Triton backward in the interpreter, by itself: hand-made settings reach every branch at sizes that take seconds.

Outputs and log-sum-exps come from a dense mask, so that an error here is the backward's. Gradients are held
against autograd through the reference in float64, with the error of eager attention as the measure. The grid: blocks
that are a tile of keys (16, 32), that divide nothing (7, 24), and that take several tiles (20, 40, tiles of 16: the way
of blocks above 128); groups of 1, 2 and 4; head_dim with and without padding; empty sequences, sequences shorter than
a block, queries that are the last few of their keys; one slot, two, more than there are blocks, none; float16, where
the sums over many rows must stay in float32. Like `test_triton_engine.py`, the file runs itself in its own process.
"""

import pytest
import torch
from interpreter import INTERPRETED, run_in_the_interpreter
from test_engines import cu, states
from tolerance import GRADIENT_SLACK, assert_close_as_eager, eager_attention, run

from moba_hf.ops import engines, routing
from moba_hf.ops.blocks import BlockLayout, sequence_spans

pytest.importorskip("triton")
inside = pytest.mark.skipif(not INTERPRETED, reason="run by test_in_the_interpreter, in a process of its own")
PACKED = ([20, 0, 7, 1, 30], [60, 3, 7, 30, 30])  # queries and keys of each sequence


@pytest.mark.skipif(INTERPRETED, reason="this is that process")
@pytest.mark.timeout(600)
def test_in_the_interpreter():
    run_in_the_interpreter(__file__)


def small_settings(block_keys: int, fused: bool, rows_per_program: int = 64):
    """Tiles of 16, so that tens of tokens are many tiles."""
    from moba_hf.ops.kernels.backward_settings import BackwardSettings, Tile

    tile = Tile(16, 16, 4, 1)
    return BackwardSettings(tile, tile, Tile(16, block_keys, 4, 1), tile, fused, rows_per_program)


def dense_forward(query, key, value, selected, cu_q, cu_k, block_size, scale):
    """(output, lse) of the engine contract."""
    output, lse = torch.zeros_like(query), torch.full(query.shape[:2], float("-inf"))
    for span in sequence_spans(cu_q, cu_k):
        rows, keys = slice(span.query_start, span.query_end), slice(span.key_start, span.key_end)
        k, v = (x[keys].float().repeat_interleave(query.shape[1] // key.shape[1], 1) for x in (key, value))
        visible = engines.load("reference").selection_mask(selected[rows], span, block_size)
        scores = (torch.einsum("qhd,khd->qhk", query[rows].float(), k) * scale).masked_fill(~visible, float("-inf"))
        lse[rows] = scores.logsumexp(-1)
        output[rows] = torch.einsum("qhk,khd->qhd", scores.softmax(-1), v).to(query.dtype)
    return output, lse


def gradients(tensors, selected, cu_q, cu_k, block_size, scale, grad_output, settings, deterministic=False):
    from moba_hf.ops.kernels.attention_backward import backward_pass

    output, lse = dense_forward(*tensors, selected, cu_q, cu_k, block_size, scale)
    layout = BlockLayout.build(cu_q, cu_k, tensors[0].shape[0], tensors[1].shape[0], block_size)
    return backward_pass(
        grad_output, *tensors, output, lse, selected, layout, block_size, scale, settings, deterministic
    )


def check(tensors, cu_q, cu_k, block_size, slots, settings, scale=0.25, grad_output=None, deterministic=False):
    """All three gradients against float64; returns them."""
    selected = routing.select(*tensors[:2], cu_q, cu_k, block_size, slots)
    where = (selected, cu_q, cu_k, block_size, scale)
    if grad_output is None:
        grad_output = torch.randn(tensors[0].shape, generator=torch.Generator().manual_seed(1)).to(tensors[0])
    reference = engines.load("reference").attention
    _, *exact = run(lambda *x: reference(*x, *where), [x.double() for x in tensors], grad_output)
    _, *eager = run(lambda *x: eager_attention(*x, *where), tensors, grad_output)
    actual = gradients(tensors, *where, grad_output, settings, deterministic)
    for name, *results in zip(("grad_query", "grad_key", "grad_value"), actual, exact, eager):
        assert results[0].dtype == tensors[0].dtype and results[0].is_contiguous()
        assert_close_as_eager(*results, GRADIENT_SLACK, name)
    return actual


@inside
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("slots", [0, 1, 2])
@pytest.mark.parametrize("block", [(16, 16, True), (24, 32, True), (20, 16, False)], ids=str)
def test_packed_chunks(dtype, slots, block):
    block_size, keys, fused = block
    lengths_q, lengths_k = PACKED
    tensors = states(lengths_q, lengths_k, 4, 2, 24, dtype)
    check(tensors, cu(lengths_q), cu(lengths_k), block_size, slots, small_settings(keys, fused))


@inside
@pytest.mark.parametrize("heads", [(3, 3), (4, 1)], ids=str)
@pytest.mark.parametrize("block", [(7, 16, True), (32, 32, True), (40, 16, False)], ids=str)
def test_more_slots_than_blocks(heads, block):
    block_size, keys, fused = block
    slots = 60 // block_size + 1
    check(states([60], [60], *heads, 16), cu([60]), cu([60]), block_size, slots, small_settings(keys, fused))


@inside
@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("fused", [False, True])
def test_all_queries_choose_one_block(fused, deterministic):
    """An attention sink: one bucket of 480 entries, cut for 32 each, or left whole and then the same every time."""
    query, key, value = states([136], [136], 4, 1, 16)
    key[:16] += 2.0
    tensors, settings = (query.abs(), key, value), small_settings(16, fused, rows_per_program=32)
    first = check(tensors, cu([136]), cu([136]), 16, 1, settings, deterministic=deterministic)
    if deterministic:
        again = check(tensors, cu([136]), cu([136]), 16, 1, settings, deterministic=True)
        assert all(torch.equal(one, two) for one, two in zip(first, again))


@inside
@pytest.mark.parametrize("scale", [2.0**-100, -0.3, 2.0])
def test_scales(scale):
    check(states([50], [50], 2, 1, 16), cu([50]), cu([50]), 16, 2, small_settings(16, True), scale)


@inside
def test_strides():
    """Views as Transformers hands them over, the stride-0 gradient of sum(), and one whose last stride is not 1."""
    tensors = states([50], [50], 4, 2, 16)
    views = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in tensors]
    settings = small_settings(16, True)
    ones = torch.ones(()).expand(50, 4, 16)
    for grad_output in (ones, torch.randn(16, 4, 50).permute(2, 1, 0)):
        where = (cu([50]), cu([50]), 16, 1, settings)
        plain = check(tensors, *where, grad_output=grad_output.contiguous())
        viewed = check(views, *where, grad_output=grad_output)
        assert all(torch.equal(one, two) for one, two in zip(plain, viewed))


@inside
@pytest.mark.parametrize("workspace_mb", ["0", "1"])
def test_passes_give_equal_results(monkeypatch, workspace_mb):
    """A workspace of nothing means passes of one head and one token."""
    tensors, where = states([7], [30], 4, 2, 16), (cu([7]), cu([30]), 8, 2)
    whole = check(tensors, *where, small_settings(16, True))
    monkeypatch.setenv("MOBA_HF_WORKSPACE_MB", workspace_mb)
    for one, two in zip(whole, check(tensors, *where, small_settings(16, True))):
        torch.testing.assert_close(one, two)


@inside
def test_every_element_is_written(monkeypatch):
    """Rows of no sequence get zeros and are not read; keys that nobody selected get their own block's part, or zero."""
    lengths_q, lengths_k = [3, 0], [40, 20]
    tensors = states(lengths_q, lengths_k, 2, 1, 16)
    where = (cu(lengths_q), cu(lengths_k))
    expected = check(tensors, *where, 16, 1, small_settings(16, True))
    padded = [torch.nn.functional.pad(x, (0, 0, 0, 0, 0, 5), value=float("nan")) for x in tensors]
    selected = torch.nn.functional.pad(routing.select(*tensors[:2], *where, 16, 1), (0, 0, 0, 0, 0, 5), value=-1)
    grad_output = torch.randn(tensors[0].shape, generator=torch.Generator().manual_seed(1))
    grad_output = torch.nn.functional.pad(grad_output, (0, 0, 0, 0, 0, 5), value=float("nan"))
    empty = torch.empty
    poison = lambda *shape, **options: empty(*shape, **options).fill_(-7)  # noqa: E731
    monkeypatch.setattr(torch, "empty", poison)
    actual = gradients(padded, selected, *where, 16, 0.25, grad_output, small_settings(16, True))
    for one, two in zip(actual, expected):
        torch.testing.assert_close(one[:-5], two)
        assert (one[-5:] == 0).all()
    assert (actual[1][40:] == 0).all() and (actual[2][40:] == 0).all()


@inside
@pytest.mark.parametrize("fused", [True, False])
def test_partial_gradients_within_the_range_of_float16(fused):
    """What a block adds to dQ is stored scaled: 20 times as much would leave float16's range. Gradients are linear."""
    lengths = [64]
    query, key, value = states(lengths, lengths, 2, 1, 16, torch.float16)
    tensors = (query, 8 * key, value)
    where = (cu(lengths), cu(lengths), 16)
    selected = routing.select(*tensors[:2], *where, 2)
    grad_output = (128 * torch.randn(query.shape, generator=torch.Generator().manual_seed(1))).to(torch.float16)
    few, many = (
        gradients(tensors, selected, *where, 0.05, factor * grad_output, small_settings(16, fused))[0]
        for factor in (1, 64)
    )
    assert many.abs().max() > 65504 * 0.05
    torch.testing.assert_close(many.float() / 64, few.float(), rtol=1e-3, atol=1e-2)
