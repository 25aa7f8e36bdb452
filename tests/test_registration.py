"""Transformers knows "moba" whatever is imported first, and whichever of its modules."""

import subprocess
import sys
import types
from importlib.machinery import ModuleSpec

import pytest

WRITTEN = """
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig, PreTrainedModel
from transformers.generation.continuous_batching import ContinuousBatchingManager
assert AttentionInterface()["moba"].__module__ == "moba_hf.integration.attention"
assert AttentionMaskInterface()["moba"].__module__ == "moba_hf.integration.masking"
assert PreTrainedConfig().moba is None and "moba" not in PreTrainedConfig().to_dict()
functions = PreTrainedModel.from_pretrained, ContinuousBatchingManager.switch_to_cb_friendly_attn
guards = [function.__wrapped__ for function in functions]
moba_hf.register()
assert not any(hasattr(function, "__wrapped__") for function in guards), "guarded twice"
"""


@pytest.mark.parametrize(
    "imports",
    [
        "import moba_hf, transformers.masking_utils",
        "import moba_hf, transformers.generation.utils",
        "import transformers.configuration_utils, moba_hf, importlib; importlib.reload(moba_hf)",
        "from transformers import LlamaForCausalLM; import moba_hf",
    ],
)
def test_any_order(imports):
    done = subprocess.run([sys.executable, "-c", imports + WRITTEN], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_reloading_registration():
    """As notebooks with autoreload do; the finder of before is still in its place."""
    reload = "import moba_hf, importlib, moba_hf.integration.registration as r; importlib.reload(r).register()"
    done = subprocess.run([sys.executable, "-c", reload + WRITTEN], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_loader_of_several_modules(monkeypatch):
    """Only the module that is waited for is written to."""
    from moba_hf.integration import registration

    class Archive:
        def find_spec(self, name, path, target=None):
            return ModuleSpec(name, self)

        def exec_module(self, module):
            module.executed = True

    finder, written = registration._WhenImported(), []
    monkeypatch.setattr(sys, "meta_path", [finder, Archive()])
    monkeypatch.setitem(registration._WRITERS, "archived", written.append)
    loader = finder.find_spec("archived", None).loader
    modules = [types.ModuleType("archived"), types.ModuleType("another")]
    for module in modules:
        loader.exec_module(module)
    assert written == modules[:1] and all(module.executed for module in modules)


def test_a_config_alone_takes_the_settings():
    """It needs no model; settings that cannot be fail here already."""
    code = "import moba_hf; from transformers import LlamaConfig as C; assert C(moba={'top_k': 3}).moba['top_k'] == 3"
    done = subprocess.run([sys.executable, "-c", code + "; C(moba={'top_k': 0})"], capture_output=True, text=True)
    assert "ValueError: top_k must be at least 1, but was 0" in done.stderr


def test_a_name_that_is_not_there():
    import moba_hf

    assert set(moba_hf.__all__) <= set(dir(moba_hf))
    with pytest.raises(AttributeError, match="module 'moba_hf' has no attribute 'moba_cache'"):
        _ = moba_hf.moba_cache
