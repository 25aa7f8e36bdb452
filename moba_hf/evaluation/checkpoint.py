"""Opening a checkpoint to be evaluated; what cannot be evaluated is refused before its weights are loaded."""

import hashlib
from dataclasses import dataclass

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GgufConfig, PreTrainedConfig, PreTrainedModel

from ..config import MobaConfig, configure

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes per element


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that has been looked at, its weights not loaded yet.

    Attributes:
        location: folder or hub id. gguf_file: GGUF file in it that holds the weights.
        dtype: of the weights; "auto" as saved.
        config: the model's, with the MoBA settings in force.
        settings: those settings.
    """

    location: str
    gguf_file: str | None
    dtype: str
    config: PreTrainedConfig
    settings: MobaConfig

    @classmethod
    def open(
        cls,
        location: str,
        *,
        longest: int,
        gguf_file: str | None = None,
        dtype: str = "float32",
        moba: dict | None = None,
        needs_settings: bool = True,
    ) -> "Checkpoint":
        """Read the config alone, and check it.

        Args:
            longest: tokens of the longest sequence to come.
            moba: fields of MobaConfig that replace the checkpoint's settings.
            needs_settings: False where the measurement brings block size and top-k of its own.

        Raises:
            ValueError: as `check` does.
        """
        config = AutoConfig.from_pretrained(location, gguf_file=gguf_file)
        settings = check(config, longest=longest, moba=moba, needs_settings=needs_settings)
        return cls(location, gguf_file, dtype, config, settings)

    @property
    def full_causal_layers(self) -> int:
        """How many layers attend all that is before them where MoBA is off: neither sliding nor linear ones."""
        config = self.config.get_text_config(decoder=True)
        kinds = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
        return list(kinds).count("full_attention")

    def tokenizer(self):
        return AutoTokenizer.from_pretrained(self.location, gguf_file=self.gguf_file)

    def model(self) -> PreTrainedModel:
        """The model with attn_implementation "moba", ready to be measured, on the GPU where there is one."""
        unpack = {"quantization_config": GgufConfig(dequantize=True)} if self.gguf_file else {}
        model = AutoModelForCausalLM.from_pretrained(
            self.location,
            gguf_file=self.gguf_file,
            config=self.config,
            dtype=self.dtype,
            attn_implementation="moba",
            **unpack,
        )
        return model.eval().to("cuda" if torch.cuda.is_available() else "cpu")


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


def load(location: str, **options):
    """(model, tokenizer) of `Checkpoint.open(location, **options)`: for those who have nothing to check in between."""
    checkpoint = Checkpoint.open(location, **options)
    return checkpoint.model(), checkpoint.tokenizer()


def weights_digest(model: PreTrainedModel) -> str:
    """Sixteen hex digits that tell these weights from others, as those of the same folder after more training.

    Of every parameter the bits are summed as integers: exact in any order, so the same on every device.
    """
    sums = [
        (name, weight.detach().view(_INTEGERS[weight.element_size()]).sum(dtype=torch.int64).item())
        for name, weight in model.named_parameters()
    ]
    return digest(sums)


def digest(content: object) -> str:
    """Sixteen hex digits that tell a content (of plain values) from others."""
    return hashlib.sha256(repr(content).encode()).hexdigest()[:16]
