"""Layers of MobaCache: block means that equal recomputed ones after every operation, and what decoding reads.

Lengths and block sizes: rows that start at different places, blocks that divide nothing, an update that ends inside a
block, completes one, or completes several.
"""

import contextlib
import copy
import gc
import weakref

import pytest
import torch
from models import BLOCK_SIZE, TOP_K, tiny_model
from torch.utils._python_dispatch import TorchDispatchMode

import moba_hf
from moba_hf import ops
from moba_hf.integration.cache import MobaCache, MobaLayer

HEADS, WIDTH = 2, 8


def states(batch: int, length: int, dtype=torch.float32, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(batch, HEADS, length, WIDTH, generator=generator).to(dtype) for _ in range(2))


def check(layer: MobaLayer, starts: tuple[int, ...], block_size: int) -> None:
    """Every mean equals, bit for bit, the one that routing takes from the row's own keys."""
    means = layer.block_means(layer.keys, starts, block_size)
    for row, start in enumerate(starts):
        own = ops.block_means(layer.keys[row, :, start:].transpose(0, 1), block_size).transpose(0, 1)
        assert torch.equal(means[row, :, : own.shape[1]], own)


@pytest.fixture(params=["no_grad", "inference_mode", "grad"])
def filled(request):
    """A layer of three rows that start at 0, 3 and 9, after 30 tokens in pieces, and that has been asked for means."""
    mode = {"no_grad": torch.no_grad, "inference_mode": torch.inference_mode, "grad": torch.enable_grad}[request.param]
    with mode():
        layer = MobaLayer()
        for piece, part in enumerate((14, 1, 9, 6)):
            layer.update(*states(3, part, seed=piece))
            check(layer, STARTS, BLOCK_SIZE)
        yield layer


STARTS = (0, 3, 9)


# ---- means ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("block_size", [1, 4, 5, 64])
@pytest.mark.parametrize("starts", [(0, 0), (0, 7)])
@torch.no_grad()
def test_update_in_pieces(dtype, block_size, starts):
    layer, given = MobaLayer(), states(2, 157, dtype)
    for part in zip(*(x.split([40, 1, 1, 1, 30, 64, 20], 2) for x in given)):
        layer.update(*part)
        check(layer, starts, block_size)
    assert torch.equal(layer.keys, given[0]) and torch.equal(layer.values, given[1])


@pytest.mark.parametrize("removed", [0, 1, 3, 7, 29, 30])
def test_crop(filled, removed):
    """New tokens after a crop replace those cropped, in means too; also when the cache is as long as before."""
    old = filled.keys.clone()
    filled.crop(-removed)
    assert torch.equal(filled.keys, old[:, :, : 30 - removed])
    filled.update(*states(3, removed + 1, seed=9))
    assert torch.equal(filled.keys[:, :, : 30 - removed], old[:, :, : 30 - removed])
    check(filled, STARTS, BLOCK_SIZE)


def test_rows(filled):
    filled.reorder_cache(torch.tensor([2, 0, 0]))
    check(filled, (9, 0, 0), BLOCK_SIZE)
    filled.batch_repeat_interleave(2)
    check(filled, (9, 9, 0, 0, 0, 0), BLOCK_SIZE)
    filled.batch_select_indices(torch.tensor([0, 3]))
    check(filled, (9, 0), BLOCK_SIZE)
    filled.batch_select_indices(torch.tensor([False, True]))
    filled.update(*states(1, 5, seed=8))
    check(filled, (0,), BLOCK_SIZE)


def test_reset_offload_prefetch_and_copies(filled):
    filled.offload()
    filled.prefetch()
    filled.update(*states(3, 3, seed=8))
    check(filled, STARTS, BLOCK_SIZE)
    if not filled.keys.is_inference():
        twin_layer = copy.deepcopy(filled)
        filled.update(*states(3, 2, seed=7))
        twin_layer.update(*states(3, 2, seed=6))
        check(twin_layer, STARTS, BLOCK_SIZE)
    check(filled, STARTS, BLOCK_SIZE)
    filled.reset()
    filled.update(*states(3, 9, seed=5))
    check(filled, STARTS, BLOCK_SIZE)


class Stream(contextlib.nullcontext):
    """In place of a GPU's: notes in `done` for which stream it waits."""

    def __init__(self, name: str, done: list[str]):
        super().__init__()
        self.name, self.done = name, done

    def wait_stream(self, other):
        self.done.append(f"{self.name} waits for {other.name}")


def noted_cache(monkeypatch, layers: int):
    """An offloaded cache after one token, and the list of what it does from then on, in order."""
    done = []
    monkeypatch.setattr(torch, "Stream", lambda: Stream("prefetch", done))
    monkeypatch.setattr(torch.cuda, "default_stream", lambda device: Stream("default", done))
    cache = MobaCache(tiny_model(num_hidden_layers=layers).config, offloading=True)

    def note(layer, name, what):
        run = getattr(layer, name)
        monkeypatch.setattr(layer, name, lambda *args: (done.append(what), run(*args))[1])

    for number, layer in enumerate(cache.layers):
        layer.update(*states(2, 1))
        note(layer, "prefetch", f"fetch {number}")
        note(layer, "update", f"read {number}")
        note(layer, "offload", f"send {number}")
        note(layer, "reorder_cache", f"reorder {number}")
    done.clear()
    return cache, done


def in_order(done, *events) -> bool:
    """Whether `done` holds the events in this order, with others between them."""
    left = iter(done)
    return all(event in left for event in events)


@torch.no_grad()
def test_fetching_waits_for_the_copies_to_the_cpu_and_for_earlier_reads(monkeypatch):
    """On a busy GPU of Transformers 5.17 a layer came back before it had gone, or onto keys not yet read."""
    cache, done = noted_cache(monkeypatch, 2)
    cache.prefetch(1)  # whatever else the installed Transformers waits for
    assert done == ["prefetch waits for default", "fetch 1"]
    done.clear()
    for layer in (0, 1):
        cache.update(*states(2, 1), layer)
    assert in_order(done, "send 0", "prefetch waits for default", "fetch 0")
    assert in_order(done, "read 0", "prefetch waits for default", "fetch 0")
    assert in_order(done, "fetch 1", "default waits for prefetch", "read 1")


@torch.no_grad()
def test_the_only_offloaded_layer_is_read_after_it_came_back(monkeypatch):
    """Fetched in its own turn: Transformers waits for the fetches before this one alone."""
    cache, done = noted_cache(monkeypatch, 1)
    layer, elsewhere = cache.layers[0], states(2, 1)[0]
    fetch = layer.prefetch
    monkeypatch.setattr(layer, "prefetch", lambda: (fetch(), setattr(layer, "keys", elsewhere)))  # as from the CPU
    cache.update(*states(2, 1), 0)
    assert in_order(done, "prefetch waits for default", "fetch 0", "default waits for prefetch", "read 0")


@torch.no_grad()
def test_beams_are_reordered_after_the_first_layer_came_back(monkeypatch):
    cache, done = noted_cache(monkeypatch, 2)
    for layer in (0, 1):
        cache.update(*states(2, 1), layer)
    cache.reorder_cache(torch.tensor([1, 0]))
    assert in_order(done, "fetch 0", "default waits for prefetch", "reorder 0")


def test_other_settings_and_modes(filled):
    """Another block size, other starts, and tensors made in inference mode that are used outside it."""
    check(filled, STARTS, 5)
    check(filled, (1, 3, 9), 5)
    with torch.no_grad():
        filled.update(*states(3, 7, seed=4))
        check(filled, STARTS, BLOCK_SIZE)


def test_empty_layers():
    """Operations before the first token are those of Transformers: nothing."""
    layer = MobaLayer()
    layer.reset()
    layer.offload()
    layer.prefetch()
    layer.reorder_cache(torch.tensor([0]))
    layer.batch_repeat_interleave(2)
    layer.batch_select_indices(torch.tensor([0]))
    assert layer.get_seq_length() == 0


class KeysRead(TorchDispatchMode):
    """Counts the elements that reductions read: the keys of which means were taken."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket is torch.ops.aten.mean:
            self.count += args[0].numel()
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def test_each_key_is_read_once():
    layer, (keys, values) = MobaLayer(), states(3, 200)
    with KeysRead() as read:
        for part in zip(keys.split(1, 2), values.split(1, 2)):
            full, _ = layer.update(*part)
            layer.block_means(full, STARTS, BLOCK_SIZE)
    assert read.count == sum((200 - start) // BLOCK_SIZE * BLOCK_SIZE for start in STARTS) * HEADS * WIDTH


@torch.no_grad()
def test_memory():
    """Means: at most 2 / block_size of the keys. Room to grow: at most 1/16. Nothing keeps a cache that is let go."""
    layer = MobaLayer()
    for part in zip(*(x.split(100, 2) for x in states(2, 1000))):
        full, _ = layer.update(*part)
        means = layer.block_means(full, (0, 50), 32)
    assert means.numel() <= 2 / 32 * layer.keys.numel()
    assert layer.keys.untyped_storage().nbytes() <= (1 + 1 / 16) * layer.keys.nbytes + 1
    gone = weakref.ref(layer._buffers[0])
    gc.disable()
    del layer, full, means
    gc.enable()
    assert gone() is None


# ---- what decoding reads -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("padded", [False, True])
@torch.no_grad()
def test_decode_reads_the_attended_blocks_alone(padded):
    """With NaN in every key and value outside the blocks that the newest token attends, its output is unchanged."""
    starts, length, block_size, heads = (0, 5) if padded else (0, 0), 90, 8, 4
    query = torch.randn(2, heads, 1, WIDTH, generator=torch.Generator().manual_seed(1))
    layer = MobaLayer()
    layer.update(*states(2, length - 3))
    key, value = layer.update(*states(2, 3, seed=1))
    means = layer.block_means(key, starts, block_size)
    where = dict(block_size=block_size, top_k=TOP_K, scale=0.4)
    on_device = torch.tensor(starts)
    expected = ops.cached_attention(query, key, value, means, on_device, **where)
    attended = torch.zeros(2, HEADS, length, dtype=torch.bool)
    for row, start in enumerate(starts):
        chosen = ops.select_blocks(
            query[row].transpose(0, 1), key[row, :, start:].transpose(0, 1), block_size=block_size, top_k=TOP_K
        )[0]
        own = (length - 1 - start) // block_size
        for head in range(heads):
            for block in [*chosen[head].tolist(), own]:
                first = start + block * block_size
                attended[row, head // (heads // HEADS), first : first + block_size] = True
    assert 0 < attended.sum() < attended.numel() / 2
    for states_ in (layer.keys, layer.values):  # the layer's own memory, also where it is not written yet
        states_.masked_fill_(~attended[..., None], float("nan"))
    for buffer in layer._buffers:
        buffer[:, :, length:] = float("nan")
    key, value = layer.keys, layer.values
    assert layer.block_means(key, starts, block_size).isfinite().all()
    assert torch.equal(ops.cached_attention(query, key, value, means, on_device, **where), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("q_len", [1, 4])
@pytest.mark.parametrize("top_k", [1, 3, 50])
@torch.no_grad()
def test_cached_attention_equals_the_operator(dtype, q_len, top_k):
    """On every dtype, GQA, rows of unequal length, with one and several new tokens."""
    key, value = states(2, 45, dtype)
    query = torch.randn(2, 4, q_len, WIDTH, generator=torch.Generator().manual_seed(2)).to(dtype)
    starts = (0, 11)
    layer = MobaLayer()
    key, value = layer.update(key, value)
    means = layer.block_means(key, starts, 6)
    got = ops.cached_attention(query, key, value, means, torch.tensor(starts), block_size=6, top_k=top_k)
    for row, start in enumerate(starts):
        packed = (query[row].transpose(0, 1), *(x[row, :, start:].transpose(0, 1) for x in (key, value)))
        expected = moba_hf.moba_attention(*packed, block_size=6, top_k=top_k, engine="reference")
        tolerance = 1e-5 if dtype == torch.float32 else 2e-2
        torch.testing.assert_close(got[row], expected, atol=tolerance, rtol=tolerance)


@torch.no_grad()
def test_ties_go_to_the_most_recent_block():
    key, value = states(1, 30)
    layer = MobaLayer()
    key, value = layer.update(key, value)
    query = torch.zeros(1, 4, 1, WIDTH)
    got = ops.cached_attention(
        query, key, value, layer.block_means(key, (0,), 4), torch.tensor([0]), block_size=4, top_k=3
    )
    expected = value[0, :, 20:].mean(1).repeat_interleave(2, 0)  # blocks 5, 6 and its own, the 2 tokens of block 7
    torch.testing.assert_close(got[0, 0], expected)


def test_gradients():
    """A cached step trains as an uncached one does: gradients of query, key and value."""
    key, value = (x.double().requires_grad_() for x in states(1, 18))
    query = torch.randn(1, 4, 2, WIDTH, dtype=torch.float64, requires_grad=True)
    layer = MobaLayer()
    means = layer.block_means(key, (3,), 4)
    got = ops.cached_attention(query, key, value, means, torch.tensor([3]), block_size=4, top_k=2)
    packed = (query[0].transpose(0, 1), *(x[0, :, 3:].transpose(0, 1) for x in (key, value)))
    expected = moba_hf.moba_attention(*packed, block_size=4, top_k=2, engine="reference")
    grads = [torch.autograd.grad(x.square().sum(), (query, key, value)) for x in (got, expected)]
    for mine, theirs in zip(*grads):
        torch.testing.assert_close(mine, theirs)
