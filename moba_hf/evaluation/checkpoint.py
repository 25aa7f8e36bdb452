"""Loading a checkpoint to be evaluated; what cannot be evaluated is refused before anything is loaded."""

from collections.abc import Sequence
from dataclasses import asdict

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GgufConfig, PreTrainedConfig, PreTrainedModel

from ..config import MobaConfig, configure


def check(
    config: PreTrainedConfig, *, longest: int, moba: dict | None = None, needs_settings: bool = True
) -> MobaConfig:
    """The MoBA settings in force; `moba`, where given, replaces the checkpoint's.

    Raises:
        ValueError: neither has any and the measurement `needs_settings`; or the model has fewer than `longest`
            positions.
    """
    text = config.get_text_config(decoder=True)
    if moba is not None:
        text.moba = moba
    if needs_settings and getattr(text, "moba", None) is None:
        raise ValueError(
            "the checkpoint has no MoBA settings, so there is nothing to compare full attention with; give some with "
            '--moba \'{"block_size": 64, "top_k": 4}\''
        )
    positions = text.max_position_embeddings
    if longest > positions:
        raise ValueError(
            f"length {longest} is above the model's {positions} positions; choose shorter lengths, or interpolate "
            f"positions first"
        )
    return configure(config)


def load(
    location: str,
    *,
    longest: int,
    gguf_file: str | None = None,
    dtype: str = "float32",
    moba: dict | None = None,
    needs_settings: bool = True,
):
    """(model, tokenizer) ready to be measured, on the GPU where there is one.

    Args:
        location: folder or hub id.
        longest: tokens of the longest sequence to come.
        gguf_file: GGUF file in it that holds the weights.
        dtype: of the weights; "auto" as saved.
        moba: fields of MobaConfig that replace the checkpoint's settings.
        needs_settings: False where the measurement brings block size and top-k of its own.

    Raises:
        ValueError: as `check` does.
    """
    config = AutoConfig.from_pretrained(location, gguf_file=gguf_file)
    check(config, longest=longest, moba=moba, needs_settings=needs_settings)
    unpack = {"quantization_config": GgufConfig(dequantize=True)} if gguf_file else {}
    model = AutoModelForCausalLM.from_pretrained(
        location, gguf_file=gguf_file, config=config, dtype=dtype, attn_implementation="moba", **unpack
    )
    tokenizer = AutoTokenizer.from_pretrained(location, gguf_file=gguf_file)
    return model.eval().to("cuda" if torch.cuda.is_available() else "cpu"), tokenizer


def describe(model: PreTrainedModel, name: str, arguments: object, leave_out: Sequence[str] = ("output_dir",)) -> dict:
    """What was measured, for the record: the model, its MoBA settings, whether it was trained with them, versions, and
    the script's arguments (a dataclass) but for those that change nothing in a result."""
    config = model.config.get_text_config(decoder=True)
    return {
        "model": name,
        "parameters": model.num_parameters(),
        "moba": config.moba,
        "moba_trained_tokens": getattr(model.config, "moba_trained_tokens", None) or 0,
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": str(model.device),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        **{name: value for name, value in asdict(arguments).items() if name not in leave_out},
    }
