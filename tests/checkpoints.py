"""A random model with a tokenizer, saved as a checkpoint, and scripts loaded as modules."""

import importlib.util
import sys
from pathlib import Path

from models import tiny_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

SCRIPTS = Path(__file__).parent.parent / "scripts"
CHAT = (
    "{% for message in messages %}<user>{{ message['content'] }}</user>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>\n{% endif %}"
)


def byte_tokenizer(chat_template: str | None = None) -> PreTrainedTokenizerFast:
    """One token per byte: lengths in tokens can be counted by hand."""
    symbols = ["<|end|>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE(vocab={s: i for i, s in enumerate(symbols)}, merges=[]))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>", chat_template=chat_template)


def save_checkpoint(folder: Path, *, positions: int = 8192, **changes) -> str:
    """A tiny Llama (3 layers, 4 query heads, MoBA block 4, top-3 unless `changes` says otherwise) and its tokenizer."""
    model = tiny_model(
        vocab_size=257, num_hidden_layers=3, max_position_embeddings=positions, pad_token_id=None, bos_token_id=None,
        eos_token_id=0, **changes,
    )  # fmt: skip
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return str(folder)


def load_script(name: str):
    spec = importlib.util.spec_from_file_location(name, SCRIPTS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module
