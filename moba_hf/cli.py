"""The console script `moba-hf`."""

import argparse
import importlib.metadata
import importlib.util
import platform
import sys

import torch

import moba_hf

_PACKAGES = ("moba_hf", "torch", "transformers", "accelerate", "datasets", "triton", "flash-attn", "deepspeed", "trl")


def main(argv: list[str] | None = None) -> int:
    """Run one subcommand; returns its exit code."""
    parser = argparse.ArgumentParser(prog="moba-hf", description="Mixture of Block Attention for Transformers.")
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("doctor", help="say what is installed and which engines run here")
    command.set_defaults(run=doctor)
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


def doctor(_arguments) -> int:
    """Print versions, devices and engines. Exit code 0 where an engine other than the reference can run, else 1."""
    print(f"python        {platform.python_version()} on {platform.system()} {platform.machine()}")
    for package in _PACKAGES:
        print(f"{package:<13} {_version(package)}")
    print(f"devices       {', '.join(_devices())}")
    engines = moba_hf.engines()
    for name, status in engines.items():
        print(f"engine        {name:<10} {'available' if status.available else 'not here: ' + status.reason}")
    return 0 if any(status.available for name, status in engines.items() if name != "reference") else 1


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _devices() -> list[str]:
    cuda = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return [f"cpu ({torch.get_num_threads()} threads)", *cuda]


if __name__ == "__main__":
    sys.exit(main())
