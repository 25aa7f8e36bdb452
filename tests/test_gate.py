"""What a layer's gate saw and chose, as `record_gates` keeps it, and the pictures of it."""

import pytest
import torch
from checkpoints import load_script, save_checkpoint
from matplotlib.colors import to_hex
from models import tiny_model

from moba_hf.evaluation.gate_figure import CHOSEN, LEFT_OUT, OWN, gate_figure
from moba_hf.evaluation.routing import record_gates, record_routing

BLOCK_SIZE, TOP_K, LENGTH = 4, 3, 30  # 7 complete blocks and a short one
MOBA = {"block_size": BLOCK_SIZE, "top_k": TOP_K}


@pytest.fixture(scope="module")
def model():
    return tiny_model(moba=MOBA)


@pytest.fixture(scope="module")
def input_ids():
    return torch.randint(1, 60, (1, LENGTH), generator=torch.Generator().manual_seed(0))


def test_scores_are_the_definition(model, input_ids):
    """⟨query, mean key⟩ of every complete past block, written as a loop."""
    gate = record_gates(model, input_ids, [1])[1]
    heads, group = gate.query.shape[1], gate.query.shape[1] // gate.key.shape[1]
    scores = gate.scores()
    assert scores.shape == (LENGTH, heads, 8) and scores.dtype == torch.float32
    for position in range(LENGTH):
        for block in range(8):
            past = block < position // BLOCK_SIZE
            mean = gate.key[block * BLOCK_SIZE : (block + 1) * BLOCK_SIZE].mean(0)
            for head in range(heads):
                expected = gate.query[position, head] @ mean[head // group] if past else torch.tensor(-torch.inf)
                torch.testing.assert_close(scores[position, head, block], expected)


def test_highest_scores_are_selected(model, input_ids):
    """Of every layer, as `record_routing` has it."""
    gates = record_gates(model, input_ids, range(model.config.num_hidden_layers))
    routing = record_routing(model, input_ids, queries=LENGTH)
    assert gates.keys() == routing.layers.keys()
    for layer, gate in gates.items():
        assert torch.equal(gate.selected, routing.layers[layer])
        best = gate.scores()[-1].topk(TOP_K - 1).indices.sort().values
        assert torch.equal(best.int(), gate.selected[-1])


def test_layers_that_stay_full_have_no_gate(input_ids):
    hybrid = tiny_model(moba={**MOBA, "full_attention_layers": [-1]})
    last = hybrid.config.num_hidden_layers - 1
    with pytest.raises(ValueError, match=rf"layers must be layers that run sparse, but \[{last}, 99\] did not"):
        record_gates(hybrid, input_ids, [0, last, 99])
    with pytest.raises(ValueError, match=r"must be one sequence \[1, length\]"):
        record_gates(hybrid, input_ids.expand(2, -1), [0])


def test_figure_shows_what_one_query_attends(model, input_ids):
    """Colours of the bars above, and of the pixels below: the last query's row."""
    gate = record_gates(model, input_ids, [0])[0]
    figure = gate_figure(gate, [f"w{i} " for i in range(LENGTH)], head=1)
    text, bars, full, moba = figure.get_axes()
    own, chosen = (LENGTH - 1) // BLOCK_SIZE, set(gate.selected[-1, 1].tolist())
    assert [to_hex(bar.get_facecolor()) == CHOSEN.lower() for bar in bars.patches] == [b in chosen for b in range(own)]
    edges = [to_hex(box.get_edgecolor()).upper() for box in text.patches]
    assert edges == [OWN if b == own else CHOSEN if b in chosen else LEFT_OUT for b in range(own + 1)]
    row = moba.images[0].get_array()[-1]
    expected = [3 if k // BLOCK_SIZE == own else 1 + (k // BLOCK_SIZE in chosen) for k in range(LENGTH)]
    assert row.tolist() == expected
    assert full.images[0].get_array()[-1].min() == 2
    assert (moba.images[0].get_array()[0][1:] == 0).all()  # the first query sees no future


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokens": ["a"]}, "tokens must be the 30 of the document, but were 1"),
        ({"head": 4}, "head must lie in 0 … 3, but was 4"),
        ({"query": 30}, "query must lie in 0 … 29, but was 30"),
    ],
)
def test_figure_refuses_what_is_not_there(model, input_ids, changes, message):
    gate = record_gates(model, input_ids, [0])[0]
    with pytest.raises(ValueError, match=message):
        gate_figure(gate, **{"tokens": ["a"] * LENGTH, "head": 0} | changes)


def test_readme_picture_is_drawn(tmp_path):
    """scripts/draw_moba.py on a tiny model; the committed picture is small enough to load at once."""
    script = load_script("draw_moba")
    tiny = save_checkpoint(tmp_path / "model", moba=MOBA)
    output = tmp_path / "moba.png"
    script.main(["--model", tiny, "--gguf_file", "", "--layer", "1", "--head", "0", "--output", str(output)])
    assert output.read_bytes().startswith(b"\x89PNG")
    assert script.FILE.stat().st_size <= 300_000
