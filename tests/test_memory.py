"""What attention never holds at a time, counted by PyTorch on a CPU: a mask of Q × K, a gate of all blocks."""

import pytest
import torch
from models import tiny_model, tokens
from test_engines import states
from test_planner import peak_bytes

import moba_hf

LENGTH = 4096


@pytest.mark.parametrize("signal", ["padding", "packing"])
@pytest.mark.parametrize("full_layers", [[0, 1], []])
@torch.no_grad()
def test_no_mask_of_queries_and_keys(full_layers, signal):
    """Full layers and sparse ones; a byte for each query and key would be the least that a mask takes."""
    model, ids = tiny_model(max_position_embeddings=LENGTH), tokens(1, LENGTH)
    moba_hf.configure(model, full_attention_layers=full_layers, block_size=64)
    mask, positions = torch.ones_like(ids), torch.cat([torch.arange(3000), torch.arange(LENGTH - 3000)])[None]
    mask[:, :100] = 0
    given = {"attention_mask": mask} if signal == "padding" else {"position_ids": positions, "use_cache": False}
    assert peak_bytes(lambda: model(ids, logits_to_keep=1, **given)) < LENGTH**2
    if signal == "padding":  # a decoding step over the padded cache: nothing of several times the keys
        cache = model(ids, logits_to_keep=1, **given).past_key_values
        held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
        longer = torch.nn.functional.pad(mask, (0, 1), value=1)
        step = peak_bytes(lambda: model(ids[:, :1], attention_mask=longer, past_key_values=cache))
        assert step < 3 * held


def test_no_gate_of_all_queries_and_blocks():
    """The scores of 4 heads, 8192 queries and 512 blocks would be 64 MiB."""
    query, key, _ = states([8192], [8192], 4, 2, 16)
    assert peak_bytes(lambda: moba_hf.select_blocks(query, key, block_size=16, top_k=4)) < 16 << 20


def test_memory_grows_with_the_tokens():
    """Forward and backward, the same blocks a query: twice the tokens take twice the memory, not four times."""
    peaks = []
    for length in (4096, 8192):
        leaves = [x.requires_grad_() for x in states([length], [length], 4, 2, 16)]

        def run(leaves=leaves):
            output = moba_hf.moba_attention(*leaves, block_size=32, top_k=4, engine="blockwise")
            return torch.autograd.grad(output.sum(), leaves)

        peaks.append(peak_bytes(run))
    assert peaks[1] < 2.2 * peaks[0]
