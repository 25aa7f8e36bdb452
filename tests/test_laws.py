"""What follows from the definition of MoBA, as properties over random shapes."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import moba_hf

ENGINES = st.sampled_from(["reference", "blockwise"])
SIZES = dict(
    engine=ENGINES,
    length=st.integers(1, 70),
    block_size=st.integers(1, 20),
    top_k=st.integers(1, 6),
    seed=st.integers(0, 99),
)
examples = settings(max_examples=25, deadline=None, derandomize=True)


def states(length, seed, heads=4, kv_heads=2, dim=8):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(length, h, dim, generator=generator) for h in (heads, kv_heads, kv_heads)]


def moba(query, key, value, **where):
    return moba_hf.moba_attention(query, key, value, **where)


def full(query, key, value):
    q, k, v = (x.transpose(0, 1) for x in (query, key, value))
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(0, 1)


def same(one, two):
    torch.testing.assert_close(one, two, atol=1e-5, rtol=1e-5)


@examples
@given(**SIZES)
def test_enough_blocks_are_full_attention(engine, length, block_size, top_k, seed):
    tensors = states(length, seed)
    enough = -(-length // block_size) + top_k - 1
    same(moba(*tensors, block_size=block_size, top_k=enough, engine=engine), full(*tensors))


@examples
@given(**SIZES)
def test_one_block_is_local_attention(engine, length, block_size, top_k, seed):
    tensors = states(length, seed)
    local = torch.cat([full(*parts) for parts in zip(*(x.split(block_size) for x in tensors))])
    same(moba(*tensors, block_size=block_size, top_k=1, engine=engine), local)


@examples
@given(**SIZES, more=st.lists(st.integers(0, 30), max_size=3))
def test_packed_equals_separate(engine, length, block_size, top_k, seed, more):
    lengths = [length, *more]
    tensors = states(sum(lengths), seed)
    cu = torch.tensor([0, *lengths]).cumsum(0).int()
    where = dict(block_size=block_size, top_k=top_k, engine=engine)
    separate = torch.cat([moba(*parts, **where) for parts in zip(*(x.split(lengths) for x in tensors))])
    same(moba(*tensors, cu_seqlens_q=cu, cu_seqlens_k=cu, **where), separate)


@examples
@given(**SIZES, data=st.data())
def test_chunked_equals_one_shot(engine, length, block_size, top_k, seed, data):
    query, key, value = states(length, seed)
    cut = data.draw(st.integers(0, length))
    where = dict(block_size=block_size, top_k=top_k, engine=engine)
    pieces = [
        moba(query[:cut], key[:cut], value[:cut], **where),
        moba(query[cut:], key, value, **where),
    ]
    same(torch.cat(pieces), moba(query, key, value, **where))


@examples
@given(**SIZES)
def test_permuting_heads_permutes_outputs(engine, length, block_size, top_k, seed):
    query, key, value = states(length, seed, heads=6, kv_heads=3)
    kv_order = torch.randperm(3, generator=torch.Generator().manual_seed(seed))
    order = (kv_order[:, None] * 2 + torch.tensor([1, 0])).flatten()  # also within each group
    where = dict(block_size=block_size, top_k=top_k, engine=engine)
    moved = moba(query[:, order], key[:, kv_order], value[:, kv_order], **where)
    same(moved, moba(query, key, value, **where)[:, order])


@examples
@given(**SIZES, data=st.data())
def test_the_future_changes_nothing(engine, length, block_size, top_k, seed, data):
    tensors = states(length, seed)
    now = data.draw(st.integers(0, length - 1))
    where = dict(block_size=block_size, top_k=top_k, engine=engine)
    before = moba(*tensors, **where)
    for x in tensors:
        x[now:] = 100.0
    same(moba(*tensors, **where)[:now], before[:now])


@examples
@given(**SIZES)
def test_only_selected_blocks_matter(engine, length, block_size, top_k, seed):
    """Values of every past block that the last query did not select are changed: its output stays."""
    query, key, value = states(length, seed, heads=1, kv_heads=1)
    where = dict(block_size=block_size, top_k=top_k)
    expected = moba(query, key, value, engine=engine, **where)[-1]
    chosen = moba_hf.select_blocks(query, key, **where)[-1, 0].tolist()
    own = (length - 1) // block_size
    for block in set(range(own)) - set(chosen):
        value[block * block_size : (block + 1) * block_size] = 1e3
    last = moba(query[-1:], key, value, engine=engine, **where)[-1]
    same(last, expected)


@examples
@given(length=st.integers(1, 70), block_size=st.integers(1, 20), top_k=st.integers(1, 6), seed=st.integers(0, 99))
def test_selection(length, block_size, top_k, seed):
    """Ascending, past only, as many as there are, the best by score; and the latest ones for a zero query."""
    query, key, _ = states(length, seed)
    where = dict(block_size=block_size, top_k=top_k)
    selected = moba_hf.select_blocks(query, key, **where)
    assert selected.dtype == torch.int32 and selected.shape == (length, 4, top_k - 1)
    latest = moba_hf.select_blocks(torch.zeros_like(query), key, **where)
    for position in range(length):
        own = position // block_size
        means = key[: own * block_size].unflatten(0, (own, block_size)).mean(1)
        for head in range(4):
            chosen = [b for b in selected[position, head].tolist() if b >= 0]
            assert chosen == sorted(set(chosen)) and selected[position, head, len(chosen) :].eq(-1).all()
            assert len(chosen) == min(top_k - 1, own) and all(b < own for b in chosen)
            scores = means[:, head // 2] @ query[position, head]
            rest = [scores[b] for b in range(own) if b not in chosen]
            assert not rest or not chosen or max(rest) <= min(scores[b] for b in chosen) + 1e-5
            assert [b for b in latest[position, head].tolist() if b >= 0] == list(range(own))[max(0, own - top_k + 1) :]


def test_exact_ties_go_to_the_most_recent_block():
    """Equal keys in some blocks: of equal scores across the last place the newest win, at every number of columns."""
    for blocks in (3, 9, 70):
        key = torch.zeros(blocks * 4 + 1, 1, 8)
        key[4:8] = 1.0  # block 1 is the best; all others tie
        query = torch.ones(1, 1, 8)
        for top_k in range(1, 6):
            chosen = [b for b in moba_hf.select_blocks(query, key, block_size=4, top_k=top_k)[0, 0].tolist() if b >= 0]
            newest = [b for b in range(blocks - 1, -1, -1) if b != 1]
            assert chosen == sorted([1, *newest][: top_k - 1])


@examples
@given(length=st.integers(1, 90), block_size=st.integers(1, 9), slots=st.integers(1, 7), seed=st.integers(0, 99))
def test_routing_sorts_by_score_and_then_by_age(length, block_size, slots, seed):
    """Scores of few different values, exact in floating point, so that most of them tie."""
    generator = torch.Generator().manual_seed(seed)
    query = torch.randint(-1, 2, (length, 2, 1), generator=generator).float()
    key = torch.randint(-1, 2, (-(-length // block_size), 1, 1), generator=generator).float()
    key = key.repeat_interleave(block_size, 0)[:length]
    selected = moba_hf.select_blocks(query, key, block_size=block_size, top_k=slots + 1)
    for row in range(length):
        candidates = list(range(row // block_size))
        for head in range(2):
            score = {block: (query[row, head, 0] * key[block * block_size, 0, 0]).item() for block in candidates}
            best = sorted(candidates, key=lambda block: (score[block], block))[-slots:]
            assert selected[row, head].tolist() == sorted(best) + [-1] * (slots - len(best))
