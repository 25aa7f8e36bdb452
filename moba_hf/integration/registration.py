"""The only file that writes to Transformers: its two registries, one config attribute, and two guards.

Each is written as soon as the module that holds it has been imported, by whoever imports it. So `import moba_hf` is as
light as `import transformers`, which imports neither PyTorch nor a model before someone asks for them.

The guards wrap methods because Transformers has no hook there, and without them a user would get dense attention
without a word: when a checkpoint with MoBA settings is loaded under another attention implementation, and when
continuous batching replaces "moba" by a FlashAttention that happens to be installed. The first also puts
`moba` of `from_pretrained(..., config=config, moba={...})` into the config, as Transformers does where it loads that.
"""

import copy
import functools
import sys
from importlib import import_module
from importlib.abc import MetaPathFinder

from transformers.utils import logging

from ..config import MobaConfig

logger = logging.get_logger(__name__)

NAME = "moba"


def register() -> None:
    """Make "moba" known to Transformers. Runs at import; calling it again changes nothing."""
    if not any(isinstance(finder, _WhenImported) for finder in sys.meta_path):
        sys.meta_path.insert(0, _WhenImported())
    for name, write in _WRITERS.items():
        if name in sys.modules:
            write(import_module(name))  # waits for another thread that has begun to import it


class _WhenImported(MetaPathFinder):
    """Lets the finders behind it find a module of `_WRITERS`, and writes to it once it has been executed."""

    def find_spec(self, name, path, target=None):
        if name not in _WRITERS:
            return None
        others = sys.meta_path[sys.meta_path.index(self) + 1 :]  # those before it have been asked
        finds = (finder.find_spec for finder in others if hasattr(finder, "find_spec"))
        spec = next(filter(None, (find(name, path, target) for find in finds)), None)
        if spec is not None:
            execute = spec.loader.exec_module

            def exec_module(module):
                execute(module)
                if module.__name__ == name:  # a loader may be that of many modules, as a zip file's
                    _WRITERS[name](module)

            spec.loader.exec_module = exec_module
        return spec


def _write_config(configuration_utils) -> None:
    config = configuration_utils.PreTrainedConfig
    if not isinstance(config.__dict__.get(NAME), _MobaSettings):
        config.moba = _MobaSettings()


def _write_mask(masking_utils) -> None:
    from .masking import moba_mask

    masking_utils.AttentionMaskInterface.register(NAME, moba_mask)


def _write_attention(modeling_utils) -> None:
    from .attention import moba_attention_forward

    modeling_utils.AttentionInterface.register(NAME, moba_attention_forward)
    model = modeling_utils.PreTrainedModel
    if not hasattr(model.from_pretrained, "_moba_guard"):
        model.from_pretrained = classmethod(_loading(model.from_pretrained.__func__))


def _write_batching(continuous_api) -> None:
    manager = continuous_api.ContinuousBatchingManager
    if not hasattr(manager.switch_to_cb_friendly_attn, "_moba_guard"):
        manager.switch_to_cb_friendly_attn = _refusing_moba(manager.switch_to_cb_friendly_attn)


_WRITERS = {
    "transformers.configuration_utils": _write_config,
    "transformers.masking_utils": _write_mask,
    "transformers.modeling_utils": _write_attention,
    "transformers.generation.continuous_batching.continuous_api": _write_batching,
}


class _MobaSettings:
    """`config.moba`: None, or a plain dict with every field of MobaConfig; validated when it is set.

    Being an attribute of every config class makes `from_pretrained(..., moba={...})` work and fail early; being kept in
    the instance's own dict makes it saved with the model, and only where it was set.
    """

    def __get__(self, config, owner=None):
        return self if config is None else config.__dict__.get(NAME)

    def __set__(self, config, settings) -> None:
        from transformers import PreTrainedConfig

        if settings is not None:
            settings = MobaConfig.from_dict(settings)
            if isinstance(layers := getattr(config, "num_hidden_layers", None), int):
                settings.full_layers(layers)
            settings = settings.to_dict()
            config.__dict__[NAME] = settings
        else:
            config.__dict__.pop(NAME, None)
        text_config = config.__dict__.get("text_config")
        if isinstance(text_config, PreTrainedConfig):  # in vision-language models the language model does the attention
            text_config.moba = settings


def _loading(from_pretrained):
    from transformers import PreTrainedConfig

    @functools.wraps(from_pretrained)
    def wrapper(cls, *args, **kwargs):
        config = kwargs.get("config")
        if NAME in kwargs and isinstance(config, PreTrainedConfig):
            config = kwargs["config"] = copy.deepcopy(config)  # the caller's stays as it is, as Transformers keeps it
            config.moba = kwargs.pop(NAME)
        loaded = from_pretrained(cls, *args, **kwargs)
        config = (loaded[0] if isinstance(loaded, tuple) else loaded).config
        if getattr(config, NAME, None) and config._attn_implementation != NAME:
            logger.warning_once(
                f"moba_hf: this checkpoint carries MoBA settings, but it was loaded with "
                f"{config._attn_implementation!r}, so it runs full attention. For MoBA, pass "
                f"attn_implementation='moba' to from_pretrained, or call model.set_attn_implementation('moba')."
            )
        return loaded

    wrapper._moba_guard = True
    return wrapper


def _refusing_moba(switch):
    @functools.wraps(switch)
    def wrapper(self, model, *args, **kwargs):
        if model.config._attn_implementation == NAME:
            raise ValueError(
                "moba does not support continuous batching. Use model.generate with MoBA, or choose full attention "
                "first: model.set_attn_implementation('sdpa')"
            )
        return switch(self, model, *args, **kwargs)

    wrapper._moba_guard = True
    return wrapper
