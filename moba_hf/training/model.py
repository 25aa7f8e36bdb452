"""The model of a training run: loading it, giving it LoRA adapters, and loading what was saved, as a user would."""

import dataclasses
import importlib.util
import json
from collections.abc import Mapping
from pathlib import Path

from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GgufConfig

from .arguments import ModelArguments, model_location

_ADAPTER = "adapter_config.json"


def load_tokenizer(arguments: ModelArguments):
    return AutoTokenizer.from_pretrained(model_location(arguments), gguf_file=arguments.gguf_file)


def load_model(arguments: ModelArguments, config, attention: str = "moba"):
    """The model to train. GGUF weights are unpacked: packed ones cannot be trained."""
    unpack = {"quantization_config": GgufConfig(dequantize=True)} if arguments.gguf_file else {}
    return AutoModelForCausalLM.from_pretrained(
        model_location(arguments),
        gguf_file=arguments.gguf_file,
        config=config,
        dtype=arguments.dtype,
        attn_implementation=attention,
        **unpack,
    )


def lora_config(settings: Mapping):
    """A peft.LoraConfig from a mapping of its fields (`r`, `lora_alpha`, `target_modules`, …).

    Raises:
        ModuleNotFoundError: peft is missing. ValueError: a field that LoraConfig does not have.
    """
    if importlib.util.find_spec("peft") is None:
        raise ModuleNotFoundError('lora needs peft: pip install "moba_hf[sft]"')
    from peft import LoraConfig

    known = {f.name for f in dataclasses.fields(LoraConfig)}
    if unknown := sorted(set(settings) - known):
        raise ValueError(f"lora: {unknown[0]!r} is no field of peft.LoraConfig")
    return LoraConfig(**{"task_type": "CAUSAL_LM", **settings})


def add_lora(model, settings: Mapping):
    """The model with adapters (peft.PeftModel): they alone are trained and saved."""
    config = lora_config(settings)
    from peft import get_peft_model

    return get_peft_model(model, config)


def save_config_beside_adapter(model, folder: Path) -> None:
    """An adapter's folder holds no config of its own: without it, the MoBA settings of the run would be lost."""
    if (folder / _ADAPTER).is_file():
        model.get_base_model().config.save_pretrained(folder)


def reload(folder: Path, arguments: ModelArguments):
    """Load a saved checkpoint, or an adapter and the model it belongs to, with MoBA: what `loading_code` says."""
    if not (folder / _ADAPTER).is_file():
        return AutoModelForCausalLM.from_pretrained(folder, attn_implementation="moba")
    from peft import PeftModel

    return PeftModel.from_pretrained(load_model(arguments, AutoConfig.from_pretrained(folder)), folder)


def loading_code(folder: str, arguments: ModelArguments, *, indent: str = "") -> str:
    """Lines of Python that load what was saved in `folder`."""
    if arguments.lora is None:
        lines = [
            'import moba_hf  # registers attn_implementation="moba"',
            "from transformers import AutoModelForCausalLM",
            "",
            f'model = AutoModelForCausalLM.from_pretrained("{folder}", attn_implementation="moba")',
        ]
    else:
        gguf = f', gguf_file="{arguments.gguf_file}"' if arguments.gguf_file else ""
        lines = [
            'import moba_hf  # registers attn_implementation="moba"',
            "from peft import PeftModel",
            "from transformers import AutoConfig, AutoModelForCausalLM",
            "",
            f'config = AutoConfig.from_pretrained("{folder}")  # with the MoBA settings',
            "base = AutoModelForCausalLM.from_pretrained(",
            f'    "{arguments.model_name_or_path}"{gguf}, config=config, attn_implementation="moba"',
            ")",
            f'model = PeftModel.from_pretrained(base, "{folder}")',
        ]
    return "\n".join(f"{indent}{line}".rstrip() for line in lines)


def describe(training_args, **groups) -> dict:
    """What was asked for, as JSON values: our arguments by group, and those of training_args that are no defaults."""
    defaults = {field.name: field.default for field in dataclasses.fields(training_args)}
    values = {
        name: value for name, value in training_args.to_dict().items() if name in defaults and name != "hub_token"
    }
    given = {name: value for name, value in values.items() if (value or None) != (defaults[name] or None)}
    ours = {name: dataclasses.asdict(group) for name, group in groups.items()}
    return json.loads(json.dumps({**ours, "training": given}, default=str))
