"""Predicted peak memory of one GPU, by part, at the moment when most is held.

Counted in Transformers' modeling_llama and checked against the CPU allocator (tests/test_planner.py). t tokens of a
rank, w bytes an element, h hidden, i intermediate, V vocabulary, a = (2 Hq + 2 Hk) d for query, output, key and value:

    kept for the backward, a layer: t · (2 h (4 + 2 w) + a w + 4 i w + 4 Hq top_k). Each of two norms keeps its input in
        float32, the normalised states and its output; attention its four tensors, log-sum-exp and selection; the MLP
        gate, SiLU, up and their product.
    prefill, a layer: t · w · (4 h + 3 i + 2 d): embeddings, layer input, residual and norm; SiLU, up, their product;
        the rotary tables. Or, in attention: 3 h, twice a, the workspace.
    backward, a layer: what it kept, t · w · (2 i + h) of gradients; or, in attention, without the MLP's: dO, dQ, dK, dV
        and the workspace.
    loss: three times t · V float32: log-softmax, its gradient, and the gradient of the logits.
"""

from dataclasses import dataclass, field

from . import times
from .counts import selections_per_head
from .devices import Device
from .shapes import ModelShape, Sharing, Work

_LOSS_TILE = 4096  # tokens whose logits exist together under a fused loss. Assumed; the libraries' defaults vary.
_BACKWARD_WORKSPACE = 3.4  # over the forward's: measured on one H100, 2.0 (S4) to 3.4 (S1 512K)


@dataclass(frozen=True)
class Memory:
    """Bytes by part at one moment. `host`: bytes of offloaded activations in host memory, for this GPU."""

    moment: str
    parts: dict[str, float] = field(default_factory=dict)
    host: float = 0.0

    @property
    def total(self) -> float:
        return sum(self.parts.values())


def prefill_memory(shape: ModelShape, work: Work, sharing: Sharing, device: Device, sparse: bool) -> Memory:
    """At the end of the prompt: the cache is full, and the last layer is at work on the last chunk."""
    chunk = min(work.length, work.prefill_chunk or work.length)
    tokens = work.batch * chunk / sharing.sequence
    item, rows = work.item, _attention_width(shape, sharing)
    mlp = item * tokens * (4 * shape.hidden + 3 * shape.intermediate + 2 * shape.head_dim)
    workspace = _workspace(shape, work, sharing, device, sparse, chunk)
    attention = item * tokens * (3 * shape.hidden + 2 * rows)
    held = {
        "weights": _inference_weights(shape, work, sharing),
        "kv cache": kv_cache_bytes(shape, work, sharing),
        "block means": _means_bytes(shape, work, sharing, sparse),
        "logits": float(work.batch * shape.vocabulary * item),
    }
    moments = (
        Memory("MLP of a layer", {**held, "activations": mlp, "workspace": 0.0}),
        Memory("attention of a layer", {**held, "activations": attention, "workspace": workspace}),
    )
    return max(moments, key=lambda m: m.total)


def decode_memory(shape: ModelShape, work: Work, sharing: Sharing, device: Device, sparse: bool) -> Memory:
    """One new token a sequence: weights and cache; everything else is small (its logits are counted)."""
    parts = {
        "weights": _inference_weights(shape, work, sharing, gathered=False),
        "kv cache": kv_cache_bytes(shape, work, sharing),
        "block means": _means_bytes(shape, work, sharing, sparse),
        "logits": float(work.batch * shape.vocabulary * work.item),
    }
    return Memory("one token", parts)


def train_memory(shape: ModelShape, work: Work, sharing: Sharing, device: Device, sparse: bool) -> Memory:
    """The worst moment of a step, see `train_moments`."""
    return max(train_moments(shape, work, sharing, device, sparse), key=lambda m: m.total)


def train_moments(
    shape: ModelShape, work: Work, sharing: Sharing, device: Device, sparse: bool
) -> tuple[Memory, Memory, Memory]:
    """Three moments of a step, one of them the worst: the loss, the backward of the last layer, and of the first."""
    tokens = work.batch * work.length / sharing.sequence
    kept, working = _layer_training(shape, work, sharing, device, sparse, tokens)
    state = 4 if work.mixed else work.item
    shard = shape.parameters / sharing.gpus
    held = {"weights": shard * state, "gathered": _gathered(shape, work, sharing), "optimizer": 2 * shard * state}
    inputs = tokens * shape.hidden * work.item
    waiting = {"none": kept, "layer": inputs, "offload": 0.0}[work.checkpointing]
    rest = 0.0 if work.checkpointing == "none" else kept  # recomputed for the layer at work
    last_norm = tokens * shape.hidden * (4 + 2 * work.item)
    head_grads = state * shape.vocabulary * shape.hidden / sharing.gpus
    all_grads = shard * state
    layer_grads = state * shape.layer_parameters / sharing.gpus
    logits = 12.0 * shape.vocabulary * (min(tokens, _LOSS_TILE) if work.fused_loss else tokens)
    if work.fused_loss:
        logits += inputs  # the gradient of the last hidden state is made with the loss
    everything = shape.layers * waiting
    host = shape.layers * inputs if work.checkpointing == "offload" else 0.0
    return (
        Memory("loss", {**held, "gradients": 0.0, "activations": everything + last_norm, "logits": logits}, host),
        Memory("backward of the last layer",
               {**held, "gradients": head_grads, "activations": everything + rest + working, "logits": 0.0}, host),
        Memory("backward of the first layer",
               {**held, "gradients": all_grads - layer_grads, "activations": waiting + rest + working, "logits": 0.0},
               host),
    )  # fmt: skip


def kv_cache_bytes(shape: ModelShape, work: Work, sharing: Sharing) -> float:
    """Keys and values of the whole length, this rank's KV heads and layers."""
    _, kv_heads = sharing.local_heads(shape)
    return float(2 * work.batch * work.length * sharing.local_layers(shape) * kv_heads * shape.head_dim * work.item)


def _attention_width(shape: ModelShape, sharing: Sharing) -> float:
    """(2 Hq + 2 Hk) d elements for each token of a rank; replicated KV heads count as often as they are held."""
    _, kv_heads = sharing.local_heads(shape)
    return 2 * (shape.heads + kv_heads * sharing.sequence) * shape.head_dim


def _layer_training(shape, work: Work, sharing: Sharing, device: Device, sparse: bool, tokens: float):
    """(bytes one layer keeps for its backward, bytes of gradients and workspace while it runs at most)."""
    item, attention = work.item, _attention_width(shape, sharing)
    mlp = shape.intermediate / work.mlp_tiles
    per_row = 4 * (work.top_k if sparse and work.sparse else 1)  # log-sum-exp and the selection, 4 bytes each
    kept = tokens * (2 * shape.hidden * (4 + 2 * item) + item * attention + 4 * mlp * item + per_row * shape.heads)
    in_mlp = tokens * item * (2 * mlp + shape.hidden)
    workspace = _BACKWARD_WORKSPACE * _workspace(shape, work, sharing, device, sparse, work.length)
    in_attention = tokens * item * (attention + shape.hidden - 4 * mlp) + workspace
    return kept, max(in_mlp, in_attention)


def _workspace(shape, work: Work, sharing: Sharing, device: Device, sparse: bool, queries: int) -> float:
    """MoBA's partial results of the forward: all of them, or the device's bound."""
    if not (sparse and work.sparse):
        return 0.0
    heads, _ = sharing.local_heads(shape)
    selections = heads * selections_per_head(work.length, work.block_size, work.top_k) * queries / work.length
    return min(device.workspace, work.batch * selections * (shape.head_dim * work.item + 4))


def _inference_weights(shape: ModelShape, work: Work, sharing: Sharing, gathered: bool = True) -> float:
    """A rank's share; in prefill also two layers gathered from the others (one at work, one on its way)."""
    share = shape.parameters / (sharing.stages * sharing.sequence)
    extra = 2 * shape.layer_parameters if gathered and sharing.sequence > 1 else 0
    return float(work.item * (share + extra))


def _means_bytes(shape: ModelShape, work: Work, sharing: Sharing, sparse: bool) -> float:
    """MobaCache keeps them for routed layers where single tokens are routed."""
    if not sparse or work.decode != "moba":
        return 0.0
    _, kv_heads = sharing.local_heads(shape)
    layers = (shape.layers - times.full_layers(shape, work, sparse)) / sharing.stages
    return work.batch * work.length // work.block_size * layers * kv_heads * shape.head_dim * work.item


def _gathered(shape: ModelShape, work: Work, sharing: Sharing) -> float:
    """Whole weights in `dtype` beside the shards: two layers, a layer's gradients, embedding and head (FSDP2's root).

    On one GPU: the copy of every weight that autocast keeps, where training is mixed.
    """
    if sharing.gpus == 1:
        return float(work.item * shape.parameters) if work.mixed and work.item < 4 else 0.0
    tables = (1 if shape.tied else 2) * shape.vocabulary * shape.hidden
    return float(work.item * (3 * shape.layer_parameters + tables))
