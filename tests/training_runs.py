"""Tiny training runs through scripts/continue_pretrain.py: material, a config file, and a run that is killed."""

import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from checkpoints import byte_tokenizer
from models import tiny_model

MOBA = {"block_size": 8, "top_k": 2, "full_attention_layers": [-1]}
CHAT = (  # as SmolLM2's: no generation tags, and a line feed after the token that ends a turn
    "{% for m in messages %}<{{ m['role'] }}>\n{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>\n{% endif %}"
)


def make_material(folder: Path, *, words: int = 40, **changes) -> Path:
    """A random Llama of 3 layers, a tokenizer of one token per byte, and 24 documents of about 5 · words tokens."""
    settings = dict(vocab_size=257, num_hidden_layers=3, max_position_embeddings=128, pad_token_id=None, moba=None)
    tiny_model(**settings | dict(bos_token_id=None, eos_token_id=0) | changes).save_pretrained(folder / "model")
    byte_tokenizer().save_pretrained(folder / "model")
    choices, draw = "alpha beta gamma delta epsilon zeta eta theta iota kappa".split(), random.Random(0)
    (folder / "text").mkdir()
    for i in range(24):
        text = " ".join(draw.choice(choices) for _ in range(words))
        (folder / "text" / f"{i:02}.txt").write_text(text, encoding="utf-8")
    return folder


def config_file(material: Path, folder: Path, **changes) -> str:
    """A config of 8 steps with changes; its path as text. The run goes to folder/run."""
    values = dict(
        model_name_or_path=str(material / "model"), moba=MOBA, dataset=str(material / "text"), sequence_length=64,
        held_out_share=0.3, held_out_sequences=2, meter_sequences=1, trailing_tokens=16, sample_tokens=0,
        output_dir=str(folder / "run"), max_steps=8, per_device_train_batch_size=2, learning_rate=1e-3,
        lr_scheduler_type="linear", logging_steps=1, save_strategy="steps", save_steps=2, report_to="none",
        use_cpu=True, disable_tqdm=True,
    ) | changes  # fmt: skip
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    return str(path)


KILLED = """
import os, signal, sys
sys.path.insert(0, {tests!r})
from checkpoints import load_script
script = load_script("continue_pretrain")
train = script.MeteredTrainer.training_step
def training_step(self, *args, **kwargs):
    if self.state.global_step == {step} - 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return train(self, *args, **kwargs)
script.MeteredTrainer.training_step = training_step
script.main(["--config", {config!r}])
"""


def run_and_kill(config: str, step: int) -> int:
    """Run the script in a process of its own that gets SIGKILL in this step; the process's return code."""
    code = KILLED.format(tests=str(Path(__file__).parent), step=step, config=config)
    return subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=300).returncode


def weights(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / "model" / "model.safetensors")


def run_without_offload(script, values: dict, file: Path) -> dict:
    """The report of a run of these values, written to the file. Offloading is refused without a GPU, and then left
    out."""
    file.write_text(yaml.safe_dump(values), encoding="utf-8")
    if (values.get("gradient_checkpointing_kwargs") or {}).get("offload"):
        with pytest.raises(ValueError, match=r"offload (moves activations off a GPU|needs Transformers 5.23)"):
            script.main(["--config", str(file)])
        file.write_text(yaml.safe_dump(values | {"gradient_checkpointing_kwargs": None}), encoding="utf-8")
    return script.main(["--config", str(file)])
