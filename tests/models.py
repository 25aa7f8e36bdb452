"""Tiny models of every supported family, and an attention function that does MoBA the slowest and plainest way."""

import torch
from transformers import AttentionInterface, AttentionMaskInterface, AutoConfig, AutoModelForCausalLM
from transformers.masking_utils import sdpa_mask

import moba_hf  # noqa: F401  registers "moba"

BLOCK_SIZE, TOP_K = 4, 3  # 12 keys of sight: sequences of 20 and more tokens are sparse

_SMALL = dict(
    vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=256, pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
FAMILIES = {
    "llama": {},
    "mistral": dict(sliding_window=None),
    "qwen2": dict(use_sliding_window=False),
    "qwen3": dict(head_dim=8, use_sliding_window=False),
    "phi3": dict(sliding_window=None),
    "granite": dict(attention_multiplier=0.37),
    "olmo2": {},
    "smollm3": dict(no_rope_layers=[1, 0], use_sliding_window=False),
    "gemma3_text": dict(head_dim=8, query_pre_attn_scalar=5, layer_types=["full_attention"] * 2),
}


def tiny_config(family: str = "llama", **changes):
    """A config of the family with MoBA settings (block 4, top-3)."""
    moba = {"block_size": BLOCK_SIZE, "top_k": TOP_K}
    return AutoConfig.for_model(family, **{**_SMALL, **FAMILIES[family], "moba": moba, **changes})


def tiny_model(family: str = "llama", attention: str = "moba", **changes):
    """A random model of the family; equal weights for equal arguments. Large weights, so that routing matters."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_config(family, **changes), attn_implementation=attention)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "q_proj" in name or "k_proj" in name or "qkv_proj" in name:
                parameter.mul_(20)
    return model.eval()


def twin(model, attention: str):
    """The same weights under another attention implementation, in a model with a config of its own."""
    config = type(model.config).from_dict(model.config.to_dict())
    copy = type(model)._from_config(config, attn_implementation=attention)
    copy.load_state_dict(model.state_dict())
    return copy.eval()


def tokens(batch: int, length: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(3, 64, (batch, length), generator=torch.Generator().manual_seed(seed))


def _oracle(module, query, key, value, attention_mask, dropout=0.0, scaling=None, **kwargs):
    """MoBA from a full [batch, 1, Q, K] mask, one query at a time; shares no code with the package.

    The keys a query may see under the mask are its sequence so far; it is the last of them. q_len 1 attends them all.
    """
    settings = module.config.moba
    block_size, top_k = settings["block_size"], settings["top_k"]
    full = [i % module.config.num_hidden_layers for i in settings["full_attention_layers"]]
    output = torch.zeros_like(query)
    for b in range(query.shape[0]):
        for i in range(query.shape[2]):
            seen = attention_mask[b, 0, i].nonzero()[:, 0]
            if len(seen) == 0:
                continue
            for h in range(query.shape[1]):
                q = query[b, h, i]
                k, v = (x[b, h * key.shape[1] // query.shape[1], seen] for x in (key, value))
                own = (len(seen) - 1) // block_size
                if module.layer_idx not in full and not (query.shape[2] == 1 and settings["decode"] == "full"):
                    means = k[: own * block_size].unflatten(0, (own, block_size)).float().mean(1).to(k.dtype)
                    order = sorted(range(own), key=lambda j, s=means.float() @ q.float(): (s[j].item(), j))
                    chosen = [*order[::-1][: top_k - 1], own]
                    keep = torch.cat([torch.arange(j * block_size, (j + 1) * block_size) for j in chosen])
                    keep = keep[keep < len(seen)]
                    k, v = k[keep], v[keep]
                output[b, h, i] = (k @ q * (scaling or q.shape[-1] ** -0.5)).softmax(0) @ v
    return output.transpose(1, 2).contiguous(), None


def _full_mask(*args, **kwargs):
    return sdpa_mask(*args, **{**kwargs, "allow_is_causal_skip": False})


AttentionInterface.register("moba_oracle", _oracle)
AttentionMaskInterface.register("moba_oracle", _full_mask)
