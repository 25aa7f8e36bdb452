"""The accelerate configurations say what they mean: read by accelerate itself, the FSDP plugin it makes of them."""

import os
from pathlib import Path
from unittest import mock

import pytest
import yaml
from accelerate.commands import launch
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.utils import FullyShardedDataParallelPlugin
from accelerate.utils.launch import prepare_multi_gpu_env
from models import tiny_model
from torch.distributed.fsdp import OffloadPolicy

CONFIGS = Path(__file__).parent.parent / "configs"
LAUNCHES = sorted((CONFIGS / "accelerate").glob("*.yaml"))
STAGES = sorted((CONFIGS / "llama-3.1-8b").glob("*.yaml"))


def launch_environment(path: Path) -> dict[str, str]:
    """What accelerate launch gives to the script's processes, as its own code makes it of the file."""
    given = ["--config_file", str(path), "--main_process_ip", "127.0.0.1", "script.py"]
    args, *_ = launch._validate_launch_command(launch.launch_command_parser().parse_args(given))
    assert args.use_fsdp and not args.cpu
    return prepare_multi_gpu_env(args)


@pytest.mark.parametrize("path", LAUNCHES, ids=lambda p: p.stem)
def test_fsdp2_over_every_gpu(path):
    given = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert set(given["fsdp_config"]) <= {action.dest for action in launch.launch_command_parser()._actions}
    config = load_config_from_file(str(path))
    assert str(config.distributed_type).endswith("FSDP") and config.mixed_precision == "bf16"
    assert config.num_processes == 8 * config.num_machines
    with mock.patch.dict(os.environ, launch_environment(path)):
        plugin = FullyShardedDataParallelPlugin()
        assert plugin.fsdp_version == 2 and plugin.reshard_after_forward is True
        assert plugin.activation_checkpointing is False, "the script checkpoints: not twice"
        assert "SHARDED" in str(plugin.state_dict_type)
        assert type(plugin.cpu_offload) is OffloadPolicy, "weights stay on the GPUs"
        model = tiny_model()
        plugin.set_auto_wrap_policy(model)
        wrapped = plugin.auto_wrap_policy.keywords["transformer_layer_cls"]
        assert {cls.__name__ for cls in wrapped} == {"LlamaDecoderLayer"}


@pytest.mark.parametrize("path", STAGES, ids=lambda p: p.stem)
def test_every_stage_shares_its_sequences_inside_a_host(path):
    stage = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert 8 % stage.get("sequence_parallel_size", 1) == 0 and stage.get("plan_gpus", 8) % 8 == 0
