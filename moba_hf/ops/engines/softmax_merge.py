"""Attention over a union of key sets from the attention over each: the online-softmax combination.

With o_i the softmax average over key set i and l_i the logarithm of its softmax denominator, the average over the union
is Σ exp(l_i − l) o_i with l = log Σ exp(l_i).
"""

import torch


def merge_weights(lse: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What each part contributes, and the log-sum-exp of the whole.

    lse: [..., parts], −inf where a part has no keys. Returns the weights [..., parts], which sum to 1, and the total
    [...]. Where no part has keys, the weights are 0 and the total is −inf.
    """
    total = torch.logsumexp(lse, -1)
    empty = (total == float("-inf"))[..., None]
    return torch.exp(lse - total[..., None]).masked_fill_(empty, 0), total
