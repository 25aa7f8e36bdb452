"""What long sequences need: attention kept where activations are checkpointed, activations in host memory, no logits of
a whole sequence. Small models: two layers, one sparse and one in full attention; the counts depend on no size.
"""

from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from models import tiny_model, tokens
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel

from moba_hf.training.checkpointing import check_checkpointing, keep_attention
from moba_hf.training.loss import check_loss, tile_loss

OFFLOADS = hasattr(PreTrainedModel, "activation_checkpointing_enable")


class Operators(TorchDispatchMode):
    """Counts what runs, by name, and keeps the largest size of a result."""

    def __init__(self):
        super().__init__()
        self.calls, self.shapes = Counter(), set()

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        self.calls[operation.name().split(".")[0]] += 1
        self.shapes |= {tuple(x.shape) for x in torch.utils._pytree.tree_leaves(result) if isinstance(x, torch.Tensor)}
        return result

    @property
    def attention(self) -> dict[str, int]:
        """Forward passes of attention: MoBA's selection and engine, and PyTorch's own."""
        own = {name.split("::")[1]: n for name, n in self.calls.items() if name.startswith("moba_flash_attn::")}
        full = sum(n for name, n in self.calls.items() if "scaled_dot_product" in name and "backward" not in name)
        return {"select": own["select_blocks"], "moba": own["attention_forward"], "full": full}


def step(checkpointing: dict | None):
    """(operators of one training step, gradients)."""
    model = tiny_model(moba={"block_size": 4, "top_k": 3, "full_attention_layers": [1]}).train()
    keep_attention(model)
    if checkpointing is not None:
        model.gradient_checkpointing_enable(**checkpointing)
    ids = tokens(1, 32)
    with Operators() as operators:
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    return operators, [p.grad for p in model.parameters()]


def test_attention_is_computed_once_with_selective_checkpointing():
    plain, expected = step(None)
    whole, recomputed = step(dict(gradient_checkpointing_kwargs={"use_reentrant": False}))
    kept, selective = step(dict(gradient_checkpointing_kwargs={"selective": True}))
    assert plain.attention == kept.attention == {"select": 1, "moba": 1, "full": 1}
    assert whole.attention == {"select": 2, "moba": 2, "full": 2}
    assert kept.calls["aten::mm"] == whole.calls["aten::mm"] > plain.calls["aten::mm"]  # the rest is computed again
    for gradients in (recomputed, selective):
        for found, right in zip(gradients, expected):
            torch.testing.assert_close(found, right, rtol=0, atol=0)


@pytest.mark.skipif(not OFFLOADS, reason="this Transformers has no activation offload: the refusal is tested instead")
@pytest.mark.parametrize("selective", [False, True])
def test_offload_and_every_n_layers_give_the_same_gradients(selective, monkeypatch):
    """Pinned memory needs a GPU: here activations are copied to memory that is not pinned."""
    copy = torch.autograd.graph.save_on_cpu
    monkeypatch.setattr("transformers.modeling_utils.save_on_cpu", lambda **_: copy(pin_memory=False))
    _, expected = step(None)
    operators, found = step(
        dict(gradient_checkpointing_kwargs={"selective": selective}, offload=True, every_n_layers=2)
    )
    assert operators.attention["moba"] == (1 if selective else 2)  # layer 0 is checkpointed, layer 1 is not
    assert operators.attention["full"] == 1
    for one, other in zip(found, expected):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["offload", "every_n_layers"])
def test_offload_is_refused_where_transformers_has_none(name, monkeypatch):
    arguments = SimpleNamespace(
        gradient_checkpointing=True, gradient_checkpointing_kwargs={name: 2}, device=torch.device("cuda")
    )
    if OFFLOADS:
        check_checkpointing(arguments)
        arguments.device = torch.device("cpu")
        if name == "offload":
            with pytest.raises(ValueError, match="offload moves activations off a GPU, but this run is on a CPU"):
                check_checkpointing(arguments)
        monkeypatch.setattr(PreTrainedModel, "activation_checkpointing_enable", lambda self: None)
    with pytest.raises(ValueError, match=f"{name} needs Transformers 5.23 or later, but this is"):
        check_checkpointing(arguments)


def test_checkpointing_settings_that_exclude_each_other():
    both = {"selective": True, "use_reentrant": True}
    with pytest.raises(ValueError, match="selective needs use_reentrant: false"):
        check_checkpointing(SimpleNamespace(gradient_checkpointing=True, gradient_checkpointing_kwargs=both))
    with pytest.raises(ValueError, match="needs gradient_checkpointing: true"):
        check_checkpointing(SimpleNamespace(gradient_checkpointing=False, gradient_checkpointing_kwargs=both))


def test_tiled_loss_is_the_loss_and_holds_no_logits():
    """4096 tokens are a tile of TRL's head, so 5000 are two."""
    ids = tokens(1, 5000)
    config = dict(num_hidden_layers=1, max_position_embeddings=5000)
    results = []
    for tiled in (False, True):
        model = tiny_model(**config).train()
        if tiled:
            tile_loss(model)
        with Operators() as operators:
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
            loss.backward()
        whole = {shape for shape in operators.shapes if shape[-1:] == (64,) and torch.Size(shape).numel() >= 4999 * 64}
        assert bool(whole) != tiled
        results.append((loss, [p.grad for p in model.parameters()]))
    assert model(input_ids=ids[:, :8], use_cache=False).logits.shape == (1, 8, 64)
    torch.testing.assert_close(results[0], results[1], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("liger", "tiled", "length", "error", "message"),
    [
        (False, False, 1 << 20, ValueError, "501 GiB of float32 logits in one forward; set use_liger_kernel"),
        (True, True, 1024, ValueError, "choose one"),
        (True, False, 1024, ValueError, "use_liger_kernel needs a GPU"),
    ],
)
def test_losses_that_cannot_be(liger, tiled, length, error, message):
    arguments = SimpleNamespace(use_liger_kernel=liger, device=torch.device("cpu"))
    with pytest.raises(error, match=message):
        check_loss(arguments, tiled=tiled, tokens=length, vocabulary=128256)


@pytest.mark.parametrize(("liger", "tiled", "package"), [(True, False, "liger-kernel"), (False, True, "trl")])
def test_missing_packages_are_named(liger, tiled, package, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    arguments = SimpleNamespace(use_liger_kernel=liger, device=torch.device("cuda"))
    with pytest.raises(ModuleNotFoundError, match=f"needs {package}: pip install"):
        check_loss(arguments, tiled=tiled, tokens=1024, vocabulary=128256)


def test_losses_that_can_be():
    arguments = SimpleNamespace(use_liger_kernel=False, device=torch.device("cpu"))
    check_loss(arguments, tiled=True, tokens=1 << 20, vocabulary=128256)
    check_loss(arguments, tiled=False, tokens=8192, vocabulary=128256)
