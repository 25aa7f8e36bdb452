"""More positions for a model: position interpolation, linear scaling, a larger θ, YaRN. Stock Transformers loads them.

The settings are a mapping; in a stage's YAML file the key `rope`:

    {method: interpolate, factor: 2}                    every frequency divided by 2, on top of whatever there is
    {method: linear, factor: 2}                         the same, as rope_type linear, which cannot stack on llama3
    {method: theta, rope_theta: 128.0e+6, max_position_embeddings: 524288}
    {method: yarn, factor: 4, beta_fast: 32, beta_slow: 1}

`linear` and `yarn` take the place of a scaling that the model has already. They do so only where it is named, e.g.
`replace: llama3`, and `factor` counts from the length that the model had before that scaling.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from transformers import PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

_STATIC = ("default", "linear", "llama3", "yarn", "longrope")  # frequencies do not depend on the sequence


def extend_positions(config: PreTrainedConfig, settings: Mapping[str, Any]) -> str:
    """Change the rotary embedding of a model that is about to be loaded from `config`, and its number of positions.

    Args:
        config: changed in place: `rope_parameters` and `max_position_embeddings` (of the text config). To be applied
            once, to the config of the checkpoint that a stage starts from; applied again, it adds to the first time.
        settings: `method`, and what that method needs (see above).

    Returns:
        What has changed, in words.

    Raises:
        ValueError: an unknown method or setting, a factor ≤ 1, fewer positions than before, a rotary embedding that
            the method cannot start from. TypeError: no mapping, or no number. Nothing is changed then.
    """
    if not isinstance(settings, Mapping):
        raise TypeError(f"rope must be a mapping, but was {settings!r}")
    config = config.get_text_config(decoder=True)
    values = dict(settings)
    method = values.pop("method", None)
    if method not in _METHODS:
        raise ValueError(f"rope: method must be one of {tuple(_METHODS)}, but was {method!r}")
    change, required, optional = _METHODS[method]
    unknown, missing = sorted(set(values) - {*required, *optional}), [name for name in required if name not in values]
    if unknown or missing:
        what = f"does not know {unknown[0]!r}" if unknown else f"needs {missing[0]!r}"
        raise ValueError(f"rope: method {method!r} {what}; its settings are {(*required, *optional)}")
    old, before = _rope_of(config), config.max_position_embeddings
    parameters, positions = change(config, old, **values)
    config.rope_parameters, config.max_position_embeddings = _kept(old) | parameters, positions
    return f"rope: {method}, {old['rope_type']} → {parameters['rope_type']}, {before:,} → {positions:,} positions"


def _rope_of(config: PreTrainedConfig) -> dict[str, Any]:
    rope = getattr(config, "rope_parameters", None)
    if not rope:
        raise ValueError(f"rope: the model ({config.model_type}) has no rotary embedding")
    if any(isinstance(value, Mapping) for value in rope.values()):
        raise ValueError(f"rope: the model ({config.model_type}) has another rotary embedding in each kind of layer")
    if rope["rope_type"] not in _STATIC:
        raise ValueError(f"rope: the model's rope_type must be one of {_STATIC}, but is {rope['rope_type']!r}")
    if rope["rope_type"] == "longrope" and list(rope["short_factor"]) != list(rope["long_factor"]):
        raise ValueError("rope: the model's longrope has other factors for short sequences than for long ones")
    return dict(rope)


def _kept(old: Mapping[str, Any]) -> dict[str, Any]:
    """What every rope_type has."""
    return {name: old[name] for name in ("rope_theta", "partial_rotary_factor") if name in old}


# ---- methods: (config, its rope parameters, settings) -> new rope parameters, positions ------------------------------


def _interpolate(config, old, factor) -> tuple[dict[str, Any], int]:
    """inv_freq = inv_freq_now / factor, as `longrope` with ext_i = inv_freq_plain_i / (inv_freq_now_i / factor).

    Transformers computes inv_freq_i = 1 / (ext_i · θ^(2i/d)) from it, whatever scaling was there before; `linear` would
    replace llama3 scaling. Equal factors for short and long sequences: nothing depends on the length. Dividing the
    frequencies is dividing the positions; the scale on cos and sin stays as it was (1 but for YaRN).
    """
    _check_factor(factor)
    powers = _powers(config, old)
    now, scale = _frequencies(config, old, powers)
    positions = _positions(config.max_position_embeddings, factor)
    ext = _ext_factors(now / factor, powers)
    again = old["rope_type"] == "longrope"
    length = old["original_max_position_embeddings"] if again else config.max_position_embeddings
    return {
        "rope_type": "longrope",
        "short_factor": ext,
        "long_factor": list(ext),
        "attention_factor": float(scale),
        "factor": positions / length,  # Transformers asks for it, and reads it where attention_factor is missing alone
        "original_max_position_embeddings": length,
    }, positions


def _linear(config, old, factor, replace=None) -> tuple[dict[str, Any], int]:
    _check_factor(factor)
    if old["rope_type"] == "linear" and replace is None:
        positions = _positions(config.max_position_embeddings, factor)
        return {"rope_type": "linear", "factor": float(old["factor"] * factor)}, positions
    length = _length_without(config, old, "linear", replace)
    return {"rope_type": "linear", "factor": float(factor)}, _grown(config, _positions(length, factor))


def _yarn(config, old, factor, replace=None, **betas) -> tuple[dict[str, Any], int]:
    _check_factor(factor)
    for name, value in betas.items():
        _check_number(name, value)
    length = _length_without(config, old, "yarn", replace)
    parameters = {"rope_type": "yarn", "factor": float(factor), "original_max_position_embeddings": length, **betas}
    return parameters, _grown(config, _positions(length, factor))


def _theta(config, old, rope_theta, max_position_embeddings) -> tuple[dict[str, Any], int]:
    """Another base of the frequencies; a llama3 or linear scaling stays on top of it."""
    if old["rope_type"] not in ("default", "linear", "llama3"):
        raise ValueError(f"rope: method 'theta' cannot start from rope_type {old['rope_type']!r}")
    _check_number("rope_theta", rope_theta)
    if rope_theta <= old["rope_theta"]:
        raise ValueError(f"rope: rope_theta must be above the model's {old['rope_theta']:g}, but was {rope_theta:g}")
    if type(max_position_embeddings) is not int:
        raise TypeError(f"rope: max_position_embeddings must be an int, but was {max_position_embeddings!r}")
    return old | {"rope_theta": float(rope_theta)}, _grown(config, max_position_embeddings)


_METHODS: dict[str, tuple[Callable, tuple[str, ...], tuple[str, ...]]] = {  # change, required settings, optional ones
    "interpolate": (_interpolate, ("factor",), ()),
    "linear": (_linear, ("factor",), ("replace",)),
    "theta": (_theta, ("rope_theta", "max_position_embeddings"), ()),
    "yarn": (_yarn, ("factor",), ("replace", "beta_fast", "beta_slow")),
}


# ---- frequencies -----------------------------------------------------------------------------------------------------


def _powers(config, rope) -> torch.Tensor:
    """θ^(2i/d), float32 [d/2], with the operations that Transformers uses."""
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    dim = int(head_dim * rope.get("partial_rotary_factor", 1.0))
    return rope["rope_theta"] ** (torch.arange(0, dim, 2, dtype=torch.int64).float() / dim)


def _frequencies(config, rope, powers: torch.Tensor) -> tuple[torch.Tensor, float]:
    """The model's present inv_freq, float32 [d/2], and the scale on cos and sin."""
    if rope["rope_type"] == "default":
        return 1.0 / powers, 1.0
    return ROPE_INIT_FUNCTIONS[rope["rope_type"]](config, torch.device("cpu"))


def _ext_factors(wanted: torch.Tensor, powers: torch.Tensor) -> list[float]:
    """ext with 1 / (ext · powers) = wanted in float32: of the quotient and its neighbours, what hits it best."""
    middle = (1.0 / powers) / wanted
    below, above = (torch.nextafter(middle, middle.new_tensor(end)) for end in (0.0, float("inf")))
    candidates = torch.stack([middle, below, above])
    best = (1.0 / (candidates * powers) - wanted).abs().argmin(0, keepdim=True)
    return candidates.gather(0, best)[0].tolist()


# ---- settings --------------------------------------------------------------------------------------------------------


def _check_number(name: str, value) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"rope: {name} must be a number, but was {value!r}")


def _check_factor(factor) -> None:
    _check_number("factor", factor)
    if not 1 < factor < float("inf"):
        raise ValueError(f"rope: factor must be above 1, but was {factor}")


def _positions(length: int, factor: float) -> int:
    positions = length * factor
    if positions != int(positions):
        raise ValueError(f"rope: factor={factor} times {length} positions is no whole number")
    return int(positions)


def _grown(config, positions: int) -> int:
    if positions <= config.max_position_embeddings:
        raise ValueError(
            f"rope: {positions} positions would be no more than the model's {config.max_position_embeddings}"
        )
    return positions


def _length_without(config, old, method: str, replace: str | None) -> int:
    """Positions of the model without its scaling, which `replace` has to name."""
    kind = old["rope_type"]
    if (None if kind == "default" else kind) != replace:
        raise ValueError(
            f"rope: method {method!r} would take the place of the model's {kind} scaling; say `replace: {kind}` if it "
            f"shall, or use method 'interpolate', which adds to it"
            if kind != "default"
            else f"rope: replace={replace!r}, but the model has no scaling"
        )
    if kind == "linear":
        return int(config.max_position_embeddings / old["factor"])
    return old.get("original_max_position_embeddings", config.max_position_embeddings)
