"""The meter gives a model's own loss in both attentions and leaves the model as it was; routing is what was run."""

import pytest
import torch
from models import BLOCK_SIZE, TOP_K, tiny_model

import moba_hf
from moba_hf.evaluation import position_loss
from moba_hf.evaluation.figures import loss_figure, routing_figure, save
from moba_hf.evaluation.position_loss import HeldOutLoss, token_losses
from moba_hf.evaluation.routing import record_routing
from moba_hf.training.meter import Meter

LENGTH = 48


@pytest.fixture
def sequences():
    return torch.randint(3, 64, (3, LENGTH), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("family", ["llama", "granite", "gemma3_text"])  # granite scales its logits, gemma may cap them
@pytest.mark.parametrize("logits_at_once", [1, 10**6])
def test_losses_are_the_models_own(family, logits_at_once, sequences, monkeypatch):
    changes = {"granite": {"logits_scaling": 3.0}, "gemma3_text": {"final_logit_softcapping": 2.0}}.get(family, {})
    model = tiny_model(family, **changes).eval()
    monkeypatch.setattr(position_loss, "_LOGITS", logits_at_once)
    losses = token_losses(model, sequences)
    assert losses.shape == (3, LENGTH - 1) and losses.dtype == torch.float32
    for row, ids in zip(losses, sequences, strict=True):
        expected = model(input_ids=ids[None], labels=ids[None], use_cache=False).loss
        torch.testing.assert_close(row.mean(), expected)


def test_both_attentions_and_nothing_left_behind(sequences):
    model = tiny_model().train()
    measured = Meter(sequences, batch_size=2).measure(model)
    assert model.training and model.config._attn_implementation == "moba"
    dense = tiny_model(attention="sdpa").eval()
    torch.testing.assert_close(measured.full.by_token, token_losses(dense, sequences))
    torch.testing.assert_close(measured.moba.by_token, token_losses(model.eval(), sequences))
    sight = BLOCK_SIZE * TOP_K  # up to there MoBA sees everything
    torch.testing.assert_close(measured.full.by_token[:, :sight], measured.moba.by_token[:, :sight])
    assert (measured.full.by_token[:, sight:] - measured.moba.by_token[:, sight:]).abs().max() > 1e-3
    assert measured.gap(8) == pytest.approx(measured.moba.trailing(8) - measured.full.trailing(8))
    assert measured.first(1).full.by_token.shape[0] == 1


def test_summaries():
    loss = HeldOutLoss(torch.tensor([[1.0, 2.0, 3.0], [3.0, 4.0, 5.0]]))
    assert loss.summary(2) == {"mean": 3.0, "trailing": 3.5}
    assert loss.by_position().tolist() == [2.0, 3.0, 4.0]
    assert loss.by_position(2).tolist() == [2.5, 4.0]


def test_routing_is_recorded_and_drawn(sequences, tmp_path):
    model = tiny_model(num_hidden_layers=3)
    moba_hf.configure(model, full_attention_layers=[1])
    routing = record_routing(model, sequences[:1], queries=10)
    assert sorted(routing.layers) == [0, 2]
    assert routing.length == LENGTH and routing.positions.tolist()[::9] == [0, LENGTH - 1]
    for selected in routing.layers.values():
        assert selected.shape == (10, 4, TOP_K - 1) and selected.dtype == torch.int32
        own = routing.positions[:, None, None] // BLOCK_SIZE
        assert ((selected < own) & (selected >= -1)).all()
        assert ((selected >= 0).sum(-1) == own[..., 0].clamp(max=TOP_K - 1)).all()
    save(routing_figure(routing, block_size=BLOCK_SIZE), tmp_path / "routing.png")
    save(loss_figure([0, 1], *[{"mean": [2, 1], "trailing": [2, 1]}] * 2, trailing_tokens=8), tmp_path / "loss.pdf")
    assert (tmp_path / "routing.png").stat().st_size and (tmp_path / "loss.pdf").stat().st_size


def test_short_sequences_are_dense(sequences):
    assert record_routing(tiny_model(), sequences[:1, : BLOCK_SIZE * TOP_K]).layers == {}
