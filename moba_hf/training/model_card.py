"""The model card, README.md beside the weights: what the model is, what it was trained on, and how to load it."""

from pathlib import Path

import yaml

from ..config import MobaConfig
from .arguments import PACKAGE_PREFIX, ModelArguments
from .model import loading_code


def write_model_card(
    folder: Path,
    model_args: ModelArguments,
    *,
    config,
    stage: str,
    data,
    length: int,
    tokens: int,
    published: Path | None = None,
) -> None:
    """Write `folder`/README.md.

    Args:
        model_args: what the run started from.
        config: of the trained model.
        stage: what kind of training this was, in words.
        data: the argument `dataset`: a name, or a mixture.
        length: tokens of a training sequence.
        tokens: seen in this run.
        published: where the folder will be, for the loading code; `folder` by default.
    """
    place = published or folder
    code = loading_code(str(place), model_args)
    rows = "\n".join(f"| {name} | {value} |" for name, value in _rows(model_args, config, stage, data, length, tokens))
    adapter = "\nThis folder holds a LoRA adapter, not the model that it belongs to.\n" if model_args.lora else ""
    text = (
        f"---\n{yaml.safe_dump(_head(model_args), sort_keys=False)}---\n\n# {place.resolve().parent.name}\n\n"
        f"A model with Mixture of Block Attention (MoBA), trained with moba_hf.\n{adapter}\n"
        f"| | |\n|---|---|\n{rows}\n\n"
        f"## Load it\n\n```python\n{code}\n```\n\n"
        f"Transformers does not save `attn_implementation`: without it the model runs in full attention.\n"
    )
    (folder / "README.md").write_text(text, encoding="utf-8")


def _head(model_args: ModelArguments) -> dict:
    """Metadata that the hub reads. A base model on this machine is none that others could follow."""
    head = {"library_name": "peft" if model_args.lora else "transformers", "pipeline_tag": "text-generation"}
    name = model_args.model_name_or_path
    if not name.startswith((PACKAGE_PREFIX, ".", "~", "/")) and name.count("/") == 1 and not Path(name).exists():
        head["base_model"] = name
    return head | {"tags": ["moba", "sparse-attention", "long-context"]}


def _rows(model_args: ModelArguments, config, stage: str, data, length: int, tokens: int):
    text = config.get_text_config()
    moba = MobaConfig.from_dict(text.moba)
    full = sorted(moba.full_layers(text.num_hidden_layers))
    trained = getattr(config, "moba_trained_tokens", None) or 0
    sparse = moba.block_size * moba.top_k
    yield "base model", model_args.model_name_or_path
    yield "stage", stage + (", LoRA adapters alone" if model_args.lora else "")
    yield "block size", f"{moba.block_size} tokens"
    yield "top-k", f"{moba.top_k} blocks, a query's own included: at most {sparse:,} keys"
    yield "layers in full attention", f"{', '.join(map(str, full)) or 'none'} of 0 … {text.num_hidden_layers - 1}"
    yield "positions", f"{text.max_position_embeddings:,}"
    yield "RoPE", _rope(text)
    yield "sequence length in training", f"{length:,} tokens"
    yield "tokens seen in this run", f"{tokens:,}"
    yield "tokens trained in MoBA mode, in all", f"{trained:,}"
    yield "prefill", f"MoBA; full attention up to {sparse:,} tokens, which the blocks cover"
    yield "decode", "full attention" if moba.decode == "full" else "MoBA"
    yield "data", _data(data)


def _rope(text_config) -> str:
    """Kind, θ and what else is a number; tables of factors would fill the page."""
    plain = {k: v for k, v in text_config.rope_parameters.items() if not isinstance(v, (list, dict))}
    return ", ".join(
        f"{name} {value:g}" if isinstance(value, float) else f"{name} {value}" for name, value in plain.items()
    )


def _data(data) -> str:
    if isinstance(data, str):
        return data
    whole = sum(one.get("weight", 1.0) for one in data)
    return ", ".join(f"{one['dataset']} ({one.get('weight', 1.0) / whole:.1%})" for one in data)
