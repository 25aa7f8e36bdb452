"""Several processes of one machine that find each other, as torchrun would start them."""

import os
import socket
import subprocess
from pathlib import Path

ROOT = Path(__file__).parent.parent


def run_together(command: list[str], number: int) -> None:
    """Run the command in `number` processes, one thread each; fails with what they said where one of them fails."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    world = {"WORLD_SIZE": str(number), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    world["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    ranks = [
        subprocess.Popen(
            command, env={**os.environ, **world, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(number)
    ]  # fmt: skip
    try:
        told = [rank.communicate(timeout=200)[1] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0] * number, told
