"""Every row of the mask table in the design notes, on three families, against a model with dense [Q, K] masks."""

import pytest
import torch
from models import tiny_model, tokens, twin
from transformers import DynamicCache, StaticCache

FAMILIES = ["llama", "qwen2", "mistral"]
LENGTH = 37  # 9 blocks and a tail: well above the 12 keys in sight


@pytest.fixture(params=FAMILIES)
def pair(request):
    model = tiny_model(request.param)
    return model, twin(model, "moba_oracle")


def logits(model, ids, **kwargs):
    with torch.no_grad():
        return model(input_ids=ids, **kwargs).logits


def assert_same(actual, expected):
    torch.testing.assert_close(actual, expected, atol=2e-4, rtol=2e-4)


def test_no_padding(pair):
    ids = tokens(2, LENGTH)
    assert_same(logits(pair[0], ids), logits(pair[1], ids))
    dense = logits(twin(pair[0], "sdpa"), ids)
    assert (logits(pair[0], ids) - dense).abs().max() > 0.01  # the test can tell MoBA from full attention


@pytest.mark.parametrize("side", ["left", "right", "both", "holes"])
@pytest.mark.parametrize("use_cache", [False, True])
def test_padding(pair, side, use_cache):
    ids, mask = tokens(3, LENGTH), torch.ones(3, LENGTH, dtype=torch.long)
    if side in ("left", "both"):
        mask[1, :9] = 0
    if side in ("right", "both"):
        mask[2, -7:] = 0
    if side == "holes":
        mask[0, 5:8] = mask[0, 20] = mask[2, 30:34] = 0
    real = mask.bool()
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    got, expected = (
        logits(m, ids, attention_mask=mask, position_ids=positions, use_cache=use_cache)[real] for m in pair
    )
    assert_same(got, expected)
    alone = logits(pair[0], ids[1:2, real[1]])
    assert_same(logits(pair[0], ids, attention_mask=mask, position_ids=positions)[1][real[1]], alone[0])


def packed_batch():
    lengths = [17, 1, 19, 4]
    ids = tokens(1, sum(lengths))
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    cu = torch.tensor([0, *lengths]).cumsum(0).int()
    return ids, positions, cu, lengths


@pytest.mark.parametrize("signal", ["position_ids", "cu_seq_lens", "both"])
@pytest.mark.parametrize("use_cache", [False, True])
@pytest.mark.parametrize("ones_mask", [False, True])
def test_packing(pair, signal, use_cache, ones_mask):
    model = pair[0]
    ids, positions, cu, lengths = packed_batch()
    given = {"use_cache": use_cache, "position_ids": positions}
    if signal != "position_ids":
        given |= dict(cu_seq_lens_q=cu, cu_seq_lens_k=cu, max_length_q=19, max_length_k=19)
    if signal == "cu_seq_lens":  # positions that say nothing of the documents; rotary embedding is relative
        given["position_ids"] = torch.arange(ids.shape[1])[None]
    if ones_mask:
        given["attention_mask"] = torch.ones_like(ids)
    packed = logits(model, ids, **given)
    alone = torch.cat([logits(model, part) for part in ids.split(lengths, 1)], 1)
    assert_same(packed, alone)


def test_packing_against_dense_mask(pair):
    ids, positions, _, _ = packed_batch()
    assert_same(*(logits(m, ids, position_ids=positions, use_cache=False) for m in pair))


def test_packed_rows_of_a_batch(pair):
    model = pair[0]
    ids = tokens(2, 30)
    positions = torch.stack([torch.cat([torch.arange(n) for n in lengths]) for lengths in ([13, 17], [22, 8])])
    expected = torch.cat(
        [
            torch.cat([logits(model, part) for part in row[None].split(lengths, 1)], 1)
            for row, lengths in zip(ids, ([13, 17], [22, 8]))
        ]
    )
    assert_same(logits(model, ids, position_ids=positions, use_cache=True), expected)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("pieces", [[16, 8, 13], [7, 30], [36, 1], [5, 2, 2, 28]])
def test_chunked_prefill_equals_one_shot(pair, padded, static, pieces):
    model, oracle = pair
    ids, mask = tokens(2, LENGTH), torch.ones(2, LENGTH, dtype=torch.long)
    if padded:
        mask[1, :6] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    expected = logits(oracle, ids, attention_mask=mask, position_ids=positions, use_cache=False)
    cache = StaticCache(config=model.config, max_cache_len=48) if static else DynamicCache(config=model.config)
    got, start = [], 0
    for piece in pieces:
        part = slice(start, start + piece)
        given = {"attention_mask": mask[:, : start + piece]} if padded else {}
        got.append(logits(model, ids[:, part], position_ids=positions[:, part], past_key_values=cache, **given))
        start += piece
    real = mask.bool()
    if pieces[-1] == 1:  # a last chunk of one token is decoding: full attention, as documented
        real[:, -1] = False
    assert_same(torch.cat(got, 1)[real], expected[real])


@pytest.mark.parametrize("padded", [False, True])
def test_static_cache_decode(pair, padded):
    """Slots that are not written yet must not be attended; a decode step attends the whole cache."""
    model, oracle = pair
    ids, mask = tokens(2, LENGTH), torch.ones(2, LENGTH, dtype=torch.long)
    if padded:
        mask[1, :6] = 0
    results = []
    for m, cache in (
        (model, StaticCache(config=model.config, max_cache_len=64)),
        (oracle, DynamicCache(config=model.config)),
    ):
        logits(m, ids[:, :-1], attention_mask=mask[:, :-1], past_key_values=cache)
        results.append(logits(m, ids[:, -1:], attention_mask=mask, past_key_values=cache))
    assert_same(*results)


def test_user_4d_mask_is_refused(pair):
    mask = torch.ones(1, 1, 20, 20, dtype=torch.bool).tril()
    with pytest.raises(ValueError, match="custom attention mask"):
        logits(pair[0], tokens(1, 20), attention_mask=mask)
