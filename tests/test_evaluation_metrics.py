"""Every metric of the evaluation against an example worked out by hand."""

import math

import pytest
import torch
from checkpoints import CHAT, byte_tokenizer
from models import tiny_model, tokens

import moba_hf
from moba_hf.evaluation import needle, position_loss, recall, ruler
from moba_hf.evaluation.modes import Mode, running
from moba_hf.evaluation.recall import Mass
from moba_hf.evaluation.result_log import ResultLog
from moba_hf.evaluation.ruler_tasks import TASKS

# ---- needle --------------------------------------------------------------------------------------------------------

TEXT = "One is here. Two is there. " * 40


@pytest.mark.parametrize("chat", [None, CHAT])
@pytest.mark.parametrize("depth", [0, 7, 50, 93, 100])
def test_needle_prompts_are_exactly_as_long_as_asked_and_hide_the_needle_between_sentences(chat, depth):
    haystack = needle.Haystack(byte_tokenizer(chat), TEXT)
    prompt = haystack.prompt("1234567", tokens=900, depth=depth)
    text = haystack.tokenizer.decode(prompt)
    assert len(prompt) == 900 and text.count("1234567") == 1
    assert text.endswith("<assistant>\nThe passcode of the lighthouse is") == bool(chat)
    hay_start = text.index("is.\n\n") + len("is.\n\n")
    place = text.index(" The passcode of the lighthouse is 1234567.")
    assert depth == 100 or text[:place].endswith((".", "\n", " "))
    hay = 900 - hay_start - (900 - text.index("\n\nWhat is")) - len(" The passcode of the lighthouse is 1234567.")
    sentence = len("Two is there. ")
    assert hay * depth / 100 - sentence <= place - hay_start <= hay * depth / 100


def test_haystacks_repeat_and_refuse():
    tokenizer = byte_tokenizer()
    assert len(needle.Haystack(tokenizer, "Short. ").prompt("1234567", tokens=500, depth=50)) == 500
    with pytest.raises(ValueError, match="haystack is empty"):
        needle.Haystack(tokenizer, " \n")
    with pytest.raises(ValueError, match="too few: question and needle alone take 238"):
        needle.Haystack(tokenizer, TEXT).prompt("1234567", tokens=100, depth=50)


@pytest.mark.parametrize(
    "wrong",
    [{"lengths": ()}, {"lengths": (8, 8)}, {"depths": (0, 101)}, {"depths": (-1,)}, {"samples": 0}, {"new_tokens": 0}],
)
def test_grids_check_themselves(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        needle.Grid(**wrong)


def test_the_papers_grid():
    assert len(needle.PAPER_LENGTHS) == 32 and needle.PAPER_LENGTHS[-1] == 1_024_000
    assert needle.PAPER_DEPTHS == (0, 7, 14, 21, 29, 36, 43, 50, 57, 64, 71, 79, 86, 93, 100)
    assert len(list(needle.Grid().cells())) == 480


def test_needle_score_and_table():
    assert needle.score(" 1234567, I think", "1234567") == 1.0
    assert needle.score("123456", "1234567") == 0.0
    grid = needle.Grid(lengths=(100, 200), depths=(0, 50))
    results = [
        {"mode": "full", "length": 100, "depth": 0, "score": 1.0},
        {"mode": "full", "length": 100, "depth": 0, "score": 0.0},
        {"mode": "full", "length": 200, "depth": 50, "score": 1.0},
        {"mode": "moba", "length": 100, "depth": 0, "score": 0.0},
    ]
    assert needle.table(results, "full", grid) == [[0.5, None], [None, 1.0]]
    assert needle.table(results, "moba", grid) == [[0.0, None], [None, None]]


def test_sentences_lose_nothing():
    for text in ("A b. C d! E", "One\n\nTwo 3.14 is. No\n", "x", ".", " . a"):
        assert "".join(needle.split_sentences(text)) == text
    assert needle.split_sentences("It is 3.5. Yes? No") == ["It is 3.5.", " Yes?", " No"]


# ---- RULER scores --------------------------------------------------------------------------------------------------


def test_official_scores():
    assert ruler.all_strings("the numbers are 17 and 23", ["17", "23", "5", "99"]) == 50.0
    assert ruler.all_strings("ABC def", ["abc"]) == 100.0  # in any case
    assert ruler.all_strings("a\tb", ["a\nb"]) == 100.0  # control characters count as line breaks
    three_names = ["Nikola Tesla", "N. Tesla", "Tesla"]
    assert ruler.any_string("It was tesla.", three_names) == 100.0
    assert ruler.all_strings("It was tesla.", three_names) == pytest.approx(100 / 3)
    assert ruler.any_string("Edison", three_names) == 0.0
    assert ruler.score(TASKS["qa_1"], "tesla", three_names) == 100.0
    assert ruler.score(TASKS["vt"], "AB", ["AB", "CD"]) == 50.0


def test_ruler_table():
    results = [
        {"mode": "full", "task": "vt", "length": 64, "score": 100.0},
        {"mode": "full", "task": "vt", "length": 64, "score": 50.0},
        {"mode": "full", "task": "cwe", "length": 64, "score": 25.0},
        {"mode": "full", "task": "cwe", "length": 128, "score": 10.0},
    ]
    assert ruler.table(results) == {
        "full": {"vt": {64: 75.0}, "cwe": {64: 25.0, 128: 10.0}, "mean": {64: 50.0, 128: 10.0}}
    }


# ---- loss by position ----------------------------------------------------------------------------------------------


def test_only_documents_that_fill_the_length_count():
    documents = [[1] * 3, list(range(10, 19)), [2] * 4, [3] * 5]
    sequences, short = position_loss.full_length(documents, 4, 3)
    # first pieces of the two long documents, then the second piece of the first
    assert sequences.tolist() == [[10, 11, 12, 13], [2] * 4, [3] * 4] and short == 1
    sequences, _ = position_loss.full_length(documents[:3], 4, 3)
    assert sequences.tolist() == [[10, 11, 12, 13], [2] * 4, [14, 15, 16, 17]]
    with pytest.raises(ValueError, match="none of the 2 documents has 4 tokens"):
        position_loss.full_length([[1], [2, 2]], 4, 1)


def test_losses_by_hand():
    """Two sequences of six tokens have five losses each."""
    loss = position_loss.HeldOutLoss(torch.tensor([[1.0, 2.0, 3.0, 4.0, 5.0], [3.0, 2.0, 1.0, 0.0, 9.0]]))
    assert loss.mean() == 3.0  # (15 + 15) / 10
    assert loss.trailing(1) == 7.0  # (5 + 9) / 2
    assert loss.trailing(3) == pytest.approx(22 / 6)  # (3 + 4 + 5 + 1 + 0 + 9) / 6
    assert loss.trailing(5) == loss.mean()
    assert loss.by_position().tolist() == [2.0, 2.0, 2.0, 2.0, 7.0]
    # windows of two: (1 + 2 + 3 + 2) / 4, (3 + 4 + 1 + 0) / 4, and the last position alone: (5 + 9) / 2
    assert loss.by_position(2).tolist() == [2.0, 2.0, 7.0]
    assert loss.by_position(4).tolist() == [2.0, 7.0] and loss.by_position(9).tolist() == [3.0]
    assert loss.first(1).mean() == 3.0 and loss.first(1).trailing(2) == 4.5
    assert loss.summary(1) == {"mean": 3.0, "trailing": 7.0}


def test_token_losses_by_hand():
    """A model whose logits are log 1, log 2 … whatever it reads: token i has probability (i + 1) / (1 + … + 64)."""
    model, ids = tiny_model(), torch.tensor([[5, 0, 63, 9]])
    model.lm_head.forward = lambda states: torch.arange(1.0, 65).log().expand(*states.shape[:2], 64)
    expected = torch.tensor([[2080 / 1, 2080 / 64, 2080 / 10]]).log()  # 1 + … + 64 = 2080; of tokens 0, 63 and 9
    torch.testing.assert_close(position_loss.token_losses(model, ids), expected)


def test_modes_are_measured_side_by_side_and_leave_nothing_behind(tmp_path):
    model, sequences = tiny_model(num_hidden_layers=3), tokens(2, 40)
    modes = (
        Mode("full", "sdpa"),
        Mode("moba", "moba"),
        Mode("hybrid", "moba", {"full_attention_layers": (0, 1, 2)}),
    )
    before = dict(model.config.moba)
    log = ResultLog(tmp_path / "losses.jsonl", {})
    assert len(list(position_loss.measure(model, sequences, modes, log))) == 6
    assert position_loss.missing(log.results, sequences, modes) == []
    losses = position_loss.collect(log.results, sequences, modes)
    assert model.config.moba == before and model.config._attn_implementation == "moba"
    torch.testing.assert_close(losses["hybrid"].by_token, losses["full"].by_token)  # all layers full
    assert (losses["moba"].by_token - losses["full"].by_token).abs().max() > 1e-3
    expected = model(input_ids=sequences[:1], labels=sequences[:1], use_cache=False).loss
    torch.testing.assert_close(losses["moba"].by_token[0].mean(), expected)
    with pytest.raises(RuntimeError), running(model, modes[2]):
        raise RuntimeError
    assert model.config.moba == before and model.config._attn_implementation == "moba"


# ---- recall --------------------------------------------------------------------------------------------------------


def test_mass_by_hand():
    """Blocks of 2, top-2, one head of dimension 1, query 1 at position 6: its past blocks are 0, 1, 2, its own is 3."""
    weights = torch.tensor([4.0, 4.0, 1.0, 9.0, 2.0, 2.0, 3.0, 5.0])  # softmax of their logarithms: proportional
    key = weights.log()[:, None, None]
    query = torch.ones(8, 1, 1)
    settings = moba_hf.MobaConfig(block_size=2, top_k=2)
    mass = recall.mass(query, key, torch.tensor([6]), 1.0, settings)
    # means of the logarithms: block 0 log 4, block 1 log 3, block 2 log 2. So block 0 is selected, though 1 is heavier.
    assert mass.selected.item() == pytest.approx((3 + 8) / 25)
    assert mass.recent.item() == pytest.approx((3 + 4) / 25)
    assert mass.best.item() == pytest.approx((3 + 10) / 25)


@pytest.mark.parametrize("family", ["llama", "granite", "qwen3"])
def test_recall_of_a_model_is_that_of_its_own_weights(family):
    """Against the attention weights that Transformers' eager attention returns, and the recorded selection."""
    model = tiny_model(family)
    ids, settings = tokens(1, 37), moba_hf.MobaConfig(block_size=4, top_k=3)
    measured = recall.measure(model, ids, settings, queries=100)
    assert sorted(measured) == [0, 1] and model.config._attn_implementation == "moba"
    model.set_attn_implementation("eager")
    weights = model(input_ids=ids, output_attentions=True, use_cache=False).attentions[0][0]  # layer 0 [heads, q, k]
    by_block = torch.nn.functional.pad(weights, (0, 3)).unflatten(-1, (10, 4)).sum(-1)
    best, recent = [], []
    for p in range(12, 37):
        past = by_block[:, p, : p // 4]
        own = by_block[:, p, p // 4]
        best.append(own + past.topk(2).values.sum(-1))
        recent.append(own + past[:, -2:].sum(-1))
    torch.testing.assert_close(measured[0].best, torch.stack(best).mean(0))
    torch.testing.assert_close(measured[0].recent, torch.stack(recent).mean(0))
    assert (measured[0].selected <= measured[0].best + 1e-6).all()


def test_recall_in_ranges_and_refusals(monkeypatch):
    model, settings = tiny_model(), moba_hf.MobaConfig(block_size=4, top_k=3)
    whole = recall.measure(model, tokens(1, 40), settings)
    monkeypatch.setattr(recall, "_RANGE", 1)
    for layer, mass in recall.measure(model, tokens(1, 40), settings).items():
        torch.testing.assert_close(mass.selected, whole[layer].selected)
    with pytest.raises(ValueError, match="covers all 12 tokens"):
        recall.measure(model, tokens(1, 12), settings)
    with pytest.raises(ValueError, match="one sequence"):
        recall.measure(model, tokens(2, 40), settings)
    sliding = tiny_model("mistral", sliding_window=8)  # its layers keep their own attention
    with pytest.raises(ValueError, match="no layer of plain causal attention"):
        recall.measure(sliding, tokens(1, 40), settings)


def test_suggestion_and_average():
    def masses(*recalls):
        return {i: Mass(*[torch.tensor([r - 0.1, r + 0.1])] * 3) for i, r in enumerate(recalls)}

    suggestion = recall.suggest(masses(0.9, 0.5, 0.8, 0.4), 2)
    assert suggestion.layers == (1, 3)
    assert "layer 3 0.400, layer 1 0.500; all other layers 0.800 to 0.900" in suggestion.ground
    with pytest.raises(ValueError, match=r"must be 1 … 4, the layers that can be measured, but was 5"):
        recall.suggest(masses(0.9, 0.5, 0.8, 0.4), 5)
    mean = recall.average([masses(0.2, 0.4), masses(0.4, 0.6)])
    torch.testing.assert_close(mean[0].selected, torch.tensor([0.2, 0.4]))
    assert all(of.selected.equal(mean[layer].selected) for layer, of in recall.from_dict(recall.to_dict(mean)).items())
    torch.testing.assert_close(mean[1].best, torch.tensor([0.4, 0.6]))
    assert math.isclose(mean[1].selected.mean().item(), 0.5, rel_tol=1e-6)


# ---- the log -------------------------------------------------------------------------------------------------------


def test_a_log_goes_on_and_refuses_other_settings(tmp_path):
    file = tmp_path / "deep" / "cells.jsonl"
    ResultLog(file, {"seed": 0, "lengths": (1, 2)}).add([{"x": 1}, {"x": 2}])
    with file.open("a") as broken:
        broken.write('{"x": 3')  # killed while writing
    log = ResultLog(file, {"seed": 0, "lengths": (1, 2)})
    assert log.results == [{"x": 1}, {"x": 2}]
    log.add([{"x": 4}])
    assert ResultLog(file, {"seed": 0, "lengths": [1, 2]}).results[-1] == {"x": 4}
    with pytest.raises(ValueError, match="seed was 0 and now is 1"):
        ResultLog(file, {"seed": 1, "lengths": (1, 2)})
