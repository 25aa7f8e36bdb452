"""MobaCache and other caches in models: every family, every way to generate, prompts in pieces, sparse decoding."""

import contextlib
import functools

import pytest
import torch
from models import FAMILIES, tiny_config, tiny_model, tokens, twin
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import DynamicSlidingWindowLayer

import moba_hf
from moba_hf import MobaCache, ops
from moba_hf.integration import attention
from moba_hf.integration.cache import MobaLayer

LENGTH = 25


def generate(model, ids, **kwargs):
    return model.generate(ids, max_new_tokens=8, min_new_tokens=8, do_sample=False, pad_token_id=0, **kwargs)


def batch(padded: bool):
    ids, mask = tokens(3, LENGTH), torch.ones(3, LENGTH, dtype=torch.long)
    if padded:
        ids[1, :6], mask[1, :6], ids[2, :11], mask[2, :11] = 0, 0, 0, 0
    return ids, mask


def test_layers_follow_the_model():
    config = tiny_config("qwen2", use_sliding_window=True, sliding_window=8, max_window_layers=1)
    layers = MobaCache(config).layers
    assert [type(layer) for layer in layers] == [MobaLayer, DynamicSlidingWindowLayer]
    assert isinstance(MobaCache(config), DynamicCache)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_every_family_hands_the_means_on(family, monkeypatch):
    """Each layer's step goes through the means, and gives what it gives without them."""
    calls = []

    def counted(*args, **kwargs):
        calls.append(args)
        return ops.cached_attention(*args, **kwargs)

    monkeypatch.setattr(attention, "cached_attention", counted)
    model, (ids, mask), logits = tiny_model(family), batch(True), []
    moba_hf.configure(model, decode="moba")
    for cache in (MobaCache(model.config), DynamicCache(config=model.config)):
        model(ids[:, :-1], attention_mask=mask[:, :-1], past_key_values=cache)
        logits.append(model(ids[:, -1:], attention_mask=mask, past_key_values=cache).logits)
        assert len(calls) == 2  # layers of the model
    torch.testing.assert_close(*logits, atol=1e-4, rtol=1e-4)


SEARCHES = {
    "greedy": {},
    "beam": dict(num_beams=3),
    "sampling": dict(do_sample=True, temperature=0.7),
    "chunks": dict(prefill_chunk_size=7),
}
ONE_ROW = {"lookup": dict(prompt_lookup_num_tokens=3), "assisted": {}}


@pytest.fixture(params=["llama", "sliding"])
def model(request):
    return sliding_model() if request.param == "sliding" else tiny_model(request.param)


def sliding_model():
    """The first layer routes over all keys, the others keep a window of 8."""
    return tiny_model("qwen2", use_sliding_window=True, sliding_window=8, max_window_layers=1)


def text(model, search: str, cache, padded: bool, **settings):
    """What `model` writes with `cache`, with decode="moba"."""
    moba_hf.configure(model, decode="moba", **settings)
    ids, mask = batch(padded)
    kwargs = {**SEARCHES, **ONE_ROW}[search]
    if search in ONE_ROW:
        ids = torch.cat([ids[:1, :13], ids[:1, :13]], 1)
        mask = torch.ones_like(ids)
        mask[:, : 3 * padded] = 0
    if search == "assisted":
        kwargs = dict(assistant_model=tiny_model("llama", num_hidden_layers=1))
    torch.manual_seed(3)
    given = {} if cache is None else {"past_key_values": cache}
    kwargs = {"do_sample": False, **kwargs}
    return model.generate(
        ids, attention_mask=mask, max_new_tokens=8, min_new_tokens=8, pad_token_id=0, **kwargs, **given
    )


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("search", [*SEARCHES, *ONE_ROW])
def test_generate_as_with_another_cache(model, search, padded):
    """The means change nothing but the work."""
    got = text(model, search, MobaCache(model.config), padded)
    assert torch.equal(got, text(model, search, None, padded))


@pytest.mark.parametrize("search", [*SEARCHES, *ONE_ROW])
def test_generate_equals_dense_where_the_blocks_cover_all(model, search):
    """Also with an engine named, where no dense kernel takes over."""
    expected = text(twin(model, "sdpa"), search, None, True)
    for engine in ("auto", "blockwise"):
        cache = MobaCache(model.config)
        assert torch.equal(text(model, search, cache, True, block_size=8, top_k=5, engine=engine), expected)


class Listener:
    """A streamer that keeps what it is given."""

    def __init__(self):
        self.tokens, self.ended = [], False

    def put(self, value):
        self.tokens += value.flatten().tolist()

    def end(self):
        self.ended = True


def test_streaming(model):
    """Each token as soon as it is there, and the same tokens."""
    moba_hf.configure(model, decode="moba")
    ids, listener = batch(False)[0][:1], Listener()
    expected = generate(model, ids, past_key_values=MobaCache(model.config))
    generate(model, ids, past_key_values=MobaCache(model.config), streamer=listener)
    assert listener.tokens == expected[0].tolist() and listener.ended


@pytest.mark.parametrize("search", ["greedy", "beam", "lookup"])
def test_decode_full(model, search):
    """The default: a single new token attends the whole cache, whatever kind of cache it is."""
    ids, mask = batch(search != "lookup")
    ids, mask = (ids[:1], mask[:1]) if search == "lookup" else (ids, mask)
    kwargs = {**SEARCHES, **ONE_ROW}[search]
    got = generate(model, ids, attention_mask=mask, past_key_values=MobaCache(model.config), **kwargs)
    assert torch.equal(got, generate(model, ids, attention_mask=mask, **kwargs))


CACHES = {
    "moba": MobaCache,
    "dynamic": lambda config, **how: DynamicCache(config=config, **how),
    "static": lambda config, **how: StaticCache(config=config, max_cache_len=40, **how),
}


@pytest.mark.parametrize("kind", CACHES)
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("block_size", [1, 3, 4, 7])
@pytest.mark.parametrize("piece", [1, 2, 5, 12])
@torch.no_grad()
def test_pieces_equal_one_shot(kind, padded, block_size, piece):
    """A prompt in one piece, in chunks that end inside blocks, and token by token: the same logits."""
    check_pieces(tiny_model(), CACHES[kind], padded, block_size, piece)


@pytest.mark.parametrize("kind", CACHES)
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("piece", [1, 5, 12])
@torch.no_grad()
def test_pieces_equal_one_shot_beside_sliding_layers(kind, padded, piece):
    """The first layer routes over all keys, the second keeps a window of 8."""
    check_pieces(sliding_model(), CACHES[kind], padded, 3, piece)


class Stream(contextlib.nullcontext):
    """In place of a GPU's: the work is done when it is asked for."""

    def wait_stream(self, other):
        pass


@pytest.mark.parametrize("kind", CACHES)
@pytest.mark.parametrize("padded", [False, True])
@torch.no_grad()
def test_pieces_equal_one_shot_offloaded(monkeypatch, kind, padded):
    """Each layer leaves the GPU after its turn and returns before the next; here both are the CPU's memory."""
    monkeypatch.setattr(torch, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "default_stream", lambda device: Stream())
    check_pieces(tiny_model(), functools.partial(CACHES[kind], offloading=True), padded, 3, 5)


def check_pieces(model, make_cache, padded: bool, block_size: int, piece: int) -> None:
    moba_hf.configure(model, decode="moba", block_size=block_size, engine="blockwise")
    ids, mask = batch(padded)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    expected = model(ids, attention_mask=mask, position_ids=positions, use_cache=False).logits
    cache, parts = make_cache(model.config), []
    for start in range(0, LENGTH, piece):
        part = slice(start, start + piece)
        where = dict(attention_mask=mask[:, : part.stop], position_ids=positions[:, part])
        parts.append(model(ids[:, part], past_key_values=cache, **where).logits)
    real = mask.bool()
    torch.testing.assert_close(torch.cat(parts, 1)[real], expected[real], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("compiled", [False, True])
@torch.no_grad()
def test_static_cache_decodes_sparsely(compiled):
    """decode="moba" in a static cache, slots not yet written among its keys; also as one compiled graph."""
    torch._dynamo.reset()
    model = tiny_model()
    moba_hf.configure(model, decode="moba")
    ids, mask = batch(True)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    expected = model(ids, attention_mask=mask, position_ids=positions, use_cache=False).logits
    cache = StaticCache(config=model.config, max_cache_len=40)
    step = torch.compile(model.forward, fullgraph=True, backend="aot_eager") if compiled else model.forward
    model(ids[:, :17], attention_mask=mask[:, :17], position_ids=positions[:, :17], past_key_values=cache)
    for i in range(17, LENGTH):
        where = dict(attention_mask=mask[:, : i + 1], position_ids=positions[:, i : i + 1])
        got = step(input_ids=ids[:, i : i + 1], past_key_values=cache, **where).logits[:, 0]
        torch.testing.assert_close(got, expected[:, i], atol=1e-4, rtol=1e-4)
