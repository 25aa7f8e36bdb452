"""The console script `moba-hf`."""

import argparse
import importlib.util
import json
import sys

from . import doctor, planner


def main(argv: list[str] | None = None) -> int:
    """Run one subcommand; returns its exit code."""
    parser = argparse.ArgumentParser(prog="moba-hf", description="Mixture of Block Attention for Transformers.")
    commands = parser.add_subparsers(dest="command", required=True)
    doctor.add_arguments(commands.add_parser("doctor", help="say what is installed and which engines run here"))
    _add_plan_arguments(commands.add_parser("plan", help="predict FLOPs, time and memory, dense and MoBA"))
    commands.add_parser("lm-eval", help="lm-eval's own command line, with attn_implementation=moba known to it")
    given = sys.argv[1:] if argv is None else argv
    if given[:1] == ["lm-eval"]:  # what follows is not for this parser, --help included
        return lm_eval(given[1:])
    arguments = parser.parse_args(given)
    return arguments.run(arguments)


def lm_eval(arguments: list[str]) -> int:
    """Hand over to lm-eval. Importing this package has registered "moba", which is all that is missing there."""
    if importlib.util.find_spec("lm_eval") is None:
        print('moba-hf lm-eval needs lm-eval: pip install "moba_hf[eval]"', file=sys.stderr)
        return 2
    from lm_eval.__main__ import cli_evaluate

    former, sys.argv = sys.argv, ["moba-hf lm-eval", *arguments]  # where its command line reads them
    try:
        cli_evaluate()
    finally:
        sys.argv = former
    return 0


def _add_plan_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `plan`; what they mean in full: `planner.Work`, `planner.Sharing`, `planner.Device`."""
    parser.add_argument("--model", default="llama-3.1-8b", help=f"{', '.join(planner.PRESETS)}, a folder or a hub id")
    parser.add_argument(
        "--length", type=int, nargs="+", default=[1 << 20], help="tokens of a sequence; several: a plan each"
    )
    parser.add_argument("--block-size", type=int, default=4096)
    parser.add_argument("--top-k", type=int, default=12)
    parser.add_argument("--full-layers", type=int, default=0, help="layers that keep full attention")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--gpus", type=int, default=1)
    parser.add_argument("--sequence-parallel", type=int, help="ranks that split the tokens; default: what is suggested")
    parser.add_argument("--mode", choices=planner.MODES, nargs="+", default=list(planner.MODES))
    parser.add_argument("--device", default="h100", help=f"{', '.join(planner.DEVICES)}, or cpu, measured now")
    parser.add_argument("--rate", nargs="+", default=[], metavar="NAME=VALUE",
                        help=f"replace a figure of the device (SI units): {', '.join(planner.RATES)}")  # fmt: skip
    parser.add_argument("--dtype", choices=planner.DTYPE_BYTES, default="bfloat16")
    parser.add_argument("--decode", choices=["full", "moba"], default="full")
    parser.add_argument("--checkpointing", choices=planner.CHECKPOINTING, default="layer")
    parser.add_argument("--pure", action="store_true", help="training keeps all of its state in --dtype")
    parser.add_argument("--full-logits", action="store_true", help="training without a fused loss")
    parser.add_argument("--mlp-tiles", type=int, default=1, help="parts of a tiled MLP in training")
    parser.add_argument("--prefill-chunk", type=int, default=0, help="tokens of a prompt at a time; 0: all")
    parser.add_argument("--json", action="store_true")
    parser.set_defaults(run=plan)


def plan(options: argparse.Namespace) -> int:
    """Print a plan for each length and mode. 2 for settings that cannot be."""
    try:
        rates = {name: float(value) for name, _, value in (rate.partition("=") for rate in options.rate)}
        device, shape = planner.device_named(options.device, rates), planner.load_shape(options.model)
        plans = [
            planner.make_plan(mode, shape, _work(options, length), device, options.gpus, options.sequence_parallel)
            for length in options.length
            for mode in options.mode
        ]
    except (ValueError, OSError) as error:  # OSError: a model that is neither here nor on the hub
        print(f"moba-hf plan: {error}", file=sys.stderr)
        return 2
    if options.json:
        print(json.dumps([made.to_dict() for made in plans], indent=1))
    else:
        print("\n\n".join([*(planner.table(made) for made in plans), f"{device.name}: {device.source}"]))
    return 0


def _work(options: argparse.Namespace, length: int) -> planner.Work:
    same = (
        "block_size",
        "top_k",
        "full_layers",
        "batch",
        "decode",
        "dtype",
        "checkpointing",
        "mlp_tiles",
        "prefill_chunk",
    )
    given = {name: getattr(options, name) for name in same}
    return planner.Work(length, mixed=not options.pure, fused_loss=not options.full_logits, **given)


if __name__ == "__main__":
    sys.exit(main())
