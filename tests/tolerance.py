"""Error bounds that come from arithmetic, not from taste: a fast engine may err as much as plain eager attention does.

Exact is the reference engine in float64. Eager is the textbook formula in the low precision: scores, softmax in float32
rounded back, weights times values, differentiated by autograd. Errors are relative Frobenius norms.
"""

import torch

from moba_hf.ops import blocks, engines, routing

# An engine rounds at other places than eager does, and its backward recomputes the weights from the LSE, which rounds
# once more. FlashAttention's own tests allow the same factors (2 for outputs, 3 for gradients).
OUTPUT_SLACK, GRADIENT_SLACK = 2.0, 3.0


def error(actual: torch.Tensor, exact: torch.Tensor) -> float:
    """‖actual − exact‖ / ‖exact‖ in float64; NaN and inf never pass a comparison with it."""
    difference = (actual.double() - exact.double()).norm()
    return (difference / exact.double().norm().clamp(min=1e-30)).item() if difference != 0 else 0.0


def assert_close_as_eager(actual, exact, eager, slack: float = OUTPUT_SLACK, what: str = "") -> None:
    """error(actual) ≤ slack · error(eager), plus a few units in the last place where eager happens to be exact."""
    allowed = slack * error(eager, exact) + 4 * torch.finfo(eager.dtype).eps
    assert error(actual, exact) <= allowed, f"{what}: error {error(actual, exact):.2e}, allowed {allowed:.2e}"


def eager_attention(query, key, value, selected, cu_q, cu_k, block_size, scale):
    """The textbook formula in the tensors' own dtype, one sequence at a time."""
    group, parts = query.shape[1] // key.shape[1], []
    for span in blocks.sequence_spans(cu_q, cu_k):
        rows = slice(span.query_start, span.query_end)
        k, v = (x[span.key_start : span.key_end].transpose(0, 1).repeat_interleave(group, 0) for x in (key, value))
        visible = engines.load("reference").selection_mask(selected[rows], span, block_size).transpose(0, 1)
        scores = (query[rows].transpose(0, 1) @ k.mT * scale).masked_fill(~visible, float("-inf"))
        parts.append((scores.softmax(-1, dtype=torch.float32).to(query.dtype) @ v).transpose(0, 1))
    return torch.cat(parts)


def run(attention, tensors, grad_output=None):
    """[output, grad_query, grad_key, grad_value] of attention(query, key, value)."""
    tensors = [x.detach().clone().requires_grad_() for x in tensors]
    output = attention(*tensors)
    grad_output = torch.ones_like(output) if grad_output is None else grad_output.to(output.dtype)
    return [output.detach(), *torch.autograd.grad(output, tensors, grad_output)]


def check_engine(engine: str, tensors, cu_q, cu_k, block_size: int, top_k: int, scale=None, grad_output=None) -> None:
    """Output and three gradients of `engine` against the float64 reference over the same selection."""
    from moba_hf.ops.operator import attention_forward

    query, key, _ = tensors
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    selected = routing.select(query.detach(), key.detach(), cu_q, cu_k, block_size, top_k - 1)
    where = (selected, cu_q, cu_k, block_size, scale)
    if grad_output is None:
        grad_output = torch.randn(query.shape, generator=torch.Generator().manual_seed(5)).to(query)
    exact = run(lambda q, k, v: engines.load("reference").attention(q, k, v, *where), [x.double() for x in tensors],
                grad_output)  # fmt: skip
    eager = run(lambda q, k, v: eager_attention(q, k, v, *where), tensors, grad_output)
    actual = run(lambda q, k, v: attention_forward(q, k, v, *where, engine)[0], tensors, grad_output)
    for name, *results in zip(("output", "grad_query", "grad_key", "grad_value"), actual, exact, eager):
        assert results[0].dtype == query.dtype and results[0].shape == results[1].shape
        slack = OUTPUT_SLACK if name == "output" else GRADIENT_SLACK
        assert_close_as_eager(*results, slack, f"{engine} {name}")
