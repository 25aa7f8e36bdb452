"""Whether attention that scripts/benchmark_attention.py times computes what ours does: sampled rows held to float64.

Exact is the textbook formula over our selection in float64, eager the same in the tensors' own dtype. Output and
gradients may differ from exact by 2 and 3 times what eager does and by a few units in the last place: the bounds of the
tests. The loss is that of the sampled rows alone, so the gradients of all keys and values are known from them.
"""

import torch

import moba_hf

ROWS = 32  # of all sequences together: a wrong block in one head of one row is 0.03 of the output's norm at 16 heads
_SLACK = {"output": 2.0, "grad_query": 3.0, "grad_key": 3.0, "grad_value": 3.0}


def disagreement(problem, contender, states, backward: bool) -> str | None:
    """Why the contender's results are not ours; None where they are.

    problem, contender: of attention_contenders; states: `problem.states(...)`. Whatever the contender raises is raised.
    """
    *tensors, grad_output = states
    rows = sample(problem).to(grad_output.device)
    found = _run(contender, tensors, grad_output, rows, backward)
    selected = None if contender.dense else _selected(problem, tensors, rows)
    squares = {name: torch.zeros(3, dtype=torch.float64) for name in found}
    for at in range(problem.batch):
        inside = (rows >= at * problem.length) & (rows < (at + 1) * problem.length)
        for kv_head in range(problem.kv_heads):
            part = _Part(problem, at, kv_head, rows[inside], inside, selected)
            states_of = part.states(tensors, grad_output)
            exact = part.attend(*(x.double() for x in states_of), backward)
            eager = part.attend(*states_of, backward)
            for name, actual in part.of(found).items():
                difference = (actual.double() - exact[name], eager[name].double() - exact[name], exact[name])
                squares[name] += torch.stack([x.square().sum() for x in difference]).cpu()
    return _verdict(squares, torch.finfo(problem.dtype).eps)


def sample(problem) -> torch.Tensor:
    """int64 [ROWS or less]: packed rows, ascending, the last one among them."""
    total = problem.batch * problem.length
    chosen = torch.randperm(total - 1, generator=torch.Generator().manual_seed(0))[: ROWS - 1]
    return torch.cat([chosen, torch.tensor([total - 1])]).sort().values


def _run(contender, tensors, grad_output, rows, backward: bool) -> dict[str, torch.Tensor]:
    """Output and grad_query of the rows, grad_key and grad_value of all keys."""
    if not backward:
        with torch.no_grad():
            return {"output": contender.attend(*(x.detach() for x in tensors))[rows]}
    output = contender.attend(*tensors)
    kept = torch.zeros_like(grad_output).index_copy_(0, rows, grad_output[rows])
    grads = torch.autograd.grad(output, tensors, kept)
    return {"output": output.detach()[rows], "grad_query": grads[0][rows], "grad_key": grads[1], "grad_value": grads[2]}


def _selected(problem, tensors, rows) -> torch.Tensor:
    query, key, _ = (x.detach() for x in tensors)
    return moba_hf.select_blocks(query, key, **problem.routing)[rows]


class _Part:
    """The sampled rows of one sequence, for the query heads of one KV head."""

    def __init__(self, problem, sequence: int, kv_head: int, rows, inside, selected):
        group, start = problem.heads // problem.kv_heads, sequence * problem.length
        self.rows, self.inside, self.kv_head = rows, inside, kv_head
        self.heads = slice(kv_head * group, (kv_head + 1) * group)
        self.keys = slice(start, start + problem.length)
        position, key_position = rows - start, torch.arange(problem.length, device=rows.device)
        self.visible = (key_position <= position[:, None])[:, None]  # [rows, 1 or group, keys]
        if selected is not None:
            block = key_position // problem.block_size
            own = self.visible & (block == (position // problem.block_size)[:, None])[:, None]
            chosen = selected[inside][:, self.heads]
            past = torch.zeros_like(own)
            for slot in range(chosen.shape[-1]):
                past = past | (chosen[..., slot, None] == block)
            self.visible = own | past

    def states(self, tensors, grad_output) -> list[torch.Tensor]:
        query, key, value = (x.detach() for x in tensors)
        by_row = [x[self.rows][:, self.heads] for x in (query, grad_output)]
        return [by_row[0], *(x[self.keys, self.kv_head] for x in (key, value)), by_row[1]]

    def of(self, found: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """What of a contender's results is this part's."""
        places = {name: (self.keys, self.kv_head) for name in ("grad_key", "grad_value")}
        return {name: x[places[name]] if name in places else x[self.inside][:, self.heads] for name, x in found.items()}

    def attend(self, query, key, value, grad_output, backward: bool) -> dict[str, torch.Tensor]:
        """query, grad_output [rows, group, head_dim]; key, value [keys, head_dim]: by the textbook formula."""
        leaves = [x.requires_grad_(backward) for x in (query.clone(), key.clone(), value.clone())]
        scores = leaves[0] @ leaves[1].T * query.shape[-1] ** -0.5
        wide = torch.promote_types(query.dtype, torch.float32)
        weights = scores.masked_fill(~self.visible, float("-inf")).softmax(-1, dtype=wide).to(query.dtype)
        output = weights @ leaves[2]
        grads = torch.autograd.grad(output, leaves, grad_output) if backward else ()
        return dict(zip(_SLACK, (output.detach(), *grads)))


def _verdict(squares: dict[str, torch.Tensor], eps: float) -> str | None:
    """The first result whose error is above what is allowed; NaN is above everything."""
    for name, sums in squares.items():
        actual, eager, exact = sums.sqrt().tolist()
        error, allowed = actual / max(exact, 1e-30), _SLACK[name] * eager / max(exact, 1e-30) + 4 * eps
        if not error <= allowed:
            return f"{name} is not ours: relative error {error:.2e}, allowed {allowed:.2e}"
    return None
