"""The two warnings: plain words, what to do, once each. Run in a process of their own: "once" is per process."""

import subprocess
import sys
from pathlib import Path

from models import tiny_model


def run(code: str) -> str:
    tests = Path(__file__).parent
    done = subprocess.run([sys.executable, "-c", code], cwd=tests, capture_output=True, text=True, check=True)
    return done.stderr


def test_a_moba_checkpoint_loaded_dense_says_so_once(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    said = run(
        "import moba_hf; from transformers import AutoModelForCausalLM as A\n"
        f"for i in range(3): A.from_pretrained({str(tmp_path)!r})"
    )
    assert said.count("carries MoBA settings") == 1
    assert "attn_implementation='moba'" in said
    said = run(
        "import moba_hf; from transformers import AutoModelForCausalLM as A\n"
        f"A.from_pretrained({str(tmp_path)!r}, attn_implementation='moba')"
    )
    assert "carries MoBA settings" not in said


def test_sparse_inference_without_training_says_so_once():
    code = "from models import tiny_model, tokens; m = tiny_model()\n"
    said = run(code + "for i in range(3): m(tokens(1, 40))")
    assert said.count("continued training") == 1
    assert "set_attn_implementation('sdpa')" in said
    assert "continued training" not in run(code + "m(tokens(1, 12))")  # covered by the blocks: full attention
    assert "continued training" not in run(code + "m.train(); m(tokens(1, 40))")
    assert "continued training" not in run(code + "m.config.moba_trained_tokens = 9; m(tokens(1, 40))")
