"""MobaConfig: the settings of MoBA, and `configure`, which puts them into a model's config.

Inside a Transformers config the settings live as a plain JSON dict, `config.moba`: it is saved with the model, and two
models with different settings live side by side.
"""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

DECODE_MODES = ("full", "moba")
ENGINES = ("auto", "reference", "blockwise", "flash", "triton")
_OTHER_NAMES = {"moba_chunk_size": "block_size", "moba_topk": "top_k"}  # of MoonshotAI/MoBA


@dataclass(frozen=True)
class MobaConfig:
    """Settings of MoBA for one model. Immutable; checks itself.

    Attributes:
        block_size: tokens per key block, at least 1.
        top_k: blocks each query attends, its own included, at least 1. A query sees at most block_size · top_k keys.
        full_attention_layers: layers that keep full attention; negative numbers count from the last layer.
        decode: "full": a single new token attends the whole cache (the paper's setting); "moba": it is routed too.
        engine: "auto", or one of the names of `moba_hf.engines()`.

    Raises:
        ValueError: a value out of range or an unknown name. TypeError: a value of the wrong type.
    """

    block_size: int = 4096
    top_k: int = 12
    full_attention_layers: tuple[int, ...] = ()
    decode: str = "full"
    engine: str = "auto"

    def __post_init__(self):
        for name in ("block_size", "top_k"):
            number = getattr(self, name)
            if type(number) is not int:
                raise TypeError(f"{name} must be an int, but was {number!r}")
            if number < 1:
                raise ValueError(f"{name} must be at least 1, but was {number}")
        layers = self.full_attention_layers
        if not isinstance(layers, Iterable) or isinstance(layers, str) or any(type(i) is not int for i in layers):
            raise TypeError(f"full_attention_layers must be a list of ints, but was {layers!r}")
        object.__setattr__(self, "full_attention_layers", tuple(layers))
        for name, allowed in (("decode", DECODE_MODES), ("engine", ENGINES)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {allowed}, but was {getattr(self, name)!r}")

    def to_dict(self) -> dict[str, Any]:
        """A plain dict that JSON can hold."""
        return {**asdict(self), "full_attention_layers": list(self.full_attention_layers)}

    @classmethod
    def from_dict(cls, settings: Mapping[str, Any]) -> "MobaConfig":
        """The inverse of `to_dict`; missing fields take their defaults. Accepts `moba_chunk_size` and `moba_topk`."""
        return cls(**known_fields(settings))

    def full_layers(self, num_layers: int) -> frozenset[int]:
        """The full-attention layers as numbers from 0. ValueError where a number is not a layer of the model."""
        wrong = [i for i in self.full_attention_layers if not -num_layers <= i < num_layers]
        if wrong:
            raise ValueError(
                f"full_attention_layers must lie in {-num_layers} … {num_layers - 1} (the model has {num_layers} "
                f"layers), but had {wrong}"
            )
        return frozenset(i % num_layers for i in self.full_attention_layers)


FIELDS = tuple(field.name for field in fields(MobaConfig))


def known_fields(settings: Mapping[str, Any]) -> dict[str, Any]:
    """`settings` under the names of MobaConfig. TypeError for no mapping, ValueError for an unknown or doubled name."""
    if not isinstance(settings, Mapping):
        raise TypeError(f"moba settings must be a dict, but were {settings!r}")
    result: dict[str, Any] = {}
    for given, value in settings.items():
        name = _OTHER_NAMES.get(given, given)
        if name not in FIELDS:
            raise ValueError(f"unknown moba setting {given!r}; the settings are {FIELDS}")
        if name in result:
            raise ValueError(f"moba setting {name!r} was given twice, once as {given!r}")
        result[name] = value
    return result


def configure(model_or_config, **settings) -> MobaConfig:
    """Change MoBA settings of a model, or of its config, at run time; what is not named stays as it was.

    The result is stored in `config.moba` (a plain dict) and so saved with the model. Takes effect at the next forward.

    Args:
        model_or_config: a Transformers model or config.
        **settings: fields of MobaConfig.

    Returns:
        The settings now in force.

    Raises:
        ValueError, TypeError: as MobaConfig does, and for layer numbers that the model does not have. Nothing is
        changed then.
    """
    config = getattr(model_or_config, "config", model_or_config)
    if hasattr(config, "get_text_config"):
        config = config.get_text_config(decoder=True)
    now = MobaConfig.from_dict(getattr(config, "moba", None) or {})
    new = replace(now, **known_fields(settings))
    new.full_layers(config.num_hidden_layers)
    config.moba = new.to_dict()
    return new
