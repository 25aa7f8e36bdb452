"""What a device delivers. Measured figures say on what; the others are scaled from them and say so.

One H100 80GB HBM3 (docs/benchmarks.md, docs/measurements: bf16, head_dim 128, torch 2.11, Triton 3.6, kernels of
version 10). The two rates of each stage of MoBA are those of least relative error, in squares, over S1 32K, 64K, 128K
and 512K, S4 with top-8 and top-16, and S2 (not for backward):

    select    FLOP / gate + selections · select_entry. S1 64K −16 %, 128K −10 %, 512K +9 %, S4 +11 %, others within 3 %.
    forward   FLOP / forward + selection bytes / gather. S1 512K −8 %, others within 4 %.
    backward  the same form. S1 512K −4 %, others within 3 %.
    dense     cuDNN, S1. Forward 648 TFLOP/s at 32K and 500 at 512K, in between by the logarithm of the length: others
              within 3 %. Backward 539, within 3 %.
"""

import math
import os
import time
from dataclasses import dataclass, replace

import torch

RESERVE = 0.06  # of the memory: CUDA context, communication buffers, fragmentation. Assumed.
MODEL_MATMUL = 0.8  # a model's matrix products over one large square one. Assumed.
GIB = 2**30
_SHORT, _LONG = 32 << 10, 512 << 10  # tokens between which the rate of dense attention falls


@dataclass(frozen=True)
class Device:
    """Rates of one device.

    Attributes:
        memory: bytes.
        matmul, dense_forward (from 512K tokens on), dense_forward_short (up to 32K), dense_backward, gate, forward,
            backward: FLOP/s.
        copy: bytes/s, read and written together. gather, gather_backward: the same for what selections move.
        select_entry: seconds for keeping one selected block in the gate's list.
        launch_select, launch_forward, launch_backward: seconds that a stage takes at least.
        link, network: bytes/s that one GPU sends to others of its node of `node` GPUs, and beyond it.
        workspace: bytes of MoBA's temporaries at most, in the forward; the module `memory` says what the
            backward takes.
        source: where the figures come from.
    """

    name: str
    memory: float
    matmul: float
    dense_forward: float
    dense_forward_short: float
    dense_backward: float
    gate: float
    forward: float
    backward: float
    copy: float
    gather: float
    gather_backward: float
    select_entry: float
    launch_select: float = 0.0
    launch_forward: float = 0.0
    launch_backward: float = 0.0
    link: float = float("inf")
    network: float = float("inf")
    node: int = 1
    workspace: float = 0.0
    source: str = ""

    def dense_rate(self, length: int) -> float:
        """FLOP/s of dense attention's forward over sequences of that length."""
        share = min(1.0, max(0.0, math.log(length / _SHORT) / math.log(_LONG / _SHORT)))
        return self.dense_forward_short + share * (self.dense_forward - self.dense_forward_short)

    @property
    def usable(self) -> float:
        """Bytes that a plan may fill."""
        return self.memory * (1 - RESERVE)


H100 = Device(
    name="h100", memory=80 * GIB, matmul=791e12 * MODEL_MATMUL,
    dense_forward=500e12, dense_forward_short=648e12, dense_backward=539e12,
    gate=141e12, forward=485e12, backward=346e12, copy=3.02e12, gather=2.32e12, gather_backward=2.63e12,
    select_entry=6.90e-11, launch_select=0.28e-3, launch_forward=0.88e-3, launch_backward=1.66e-3,
    link=450e9, network=50e9, node=8, workspace=GIB,
    source="rates measured on one H100 80GB HBM3; launches are S1 8K, which they bound; matmul times an assumed 0.8; "
    "NVLink 450 GB/s and network 50 GB/s a GPU from the data sheets, not measured",
)  # fmt: skip


def _scaled(name: str, memory: float, compute: float, bandwidth: float, link: float) -> Device:
    """H100's rates times the ratio of the data sheets' peaks: assumes that the kernels are as good elsewhere."""
    flops = ("matmul", "dense_forward", "dense_forward_short", "dense_backward", "gate", "forward", "backward")
    rates = {rate: getattr(H100, rate) * compute for rate in flops}
    rates |= {rate: getattr(H100, rate) * bandwidth for rate in ("copy", "gather", "gather_backward")}
    source = (
        f"H100's measured rates × {compute:.3g} (FLOP) and × {bandwidth:.3g} (bytes), the data sheets' peaks: assumed"
    )
    return replace(
        H100, name=name, memory=memory, link=link, select_entry=H100.select_entry / compute, source=source, **rates
    )


DEVICES = {
    "h100": H100,
    "h200": _scaled("h200", 141e9, 1.0, 4.8 / 3.35, 450e9),
    "a100": _scaled("a100", 80 * GIB, 312 / 989, 2.039 / 3.35, 300e9),
}
RATES = ("matmul", "dense_forward", "dense_forward_short", "dense_backward", "gate", "forward", "backward", "copy",
         "gather", "gather_backward", "select_entry", "link", "network", "memory")  # fmt: skip


def device_named(name: str, rates: dict[str, float]) -> Device:
    """A device of `DEVICES`, or "cpu", which is measured here and now; `rates` replace single fields.

    Raises ValueError for an unknown device or rate.
    """
    unknown = [rate for rate in rates if rate not in RATES]
    if unknown:
        raise ValueError(f"unknown rate {unknown[0]!r}; the rates are {RATES}")
    if name != "cpu" and name not in DEVICES:
        raise ValueError(f"unknown device {name!r}; choose one of {(*DEVICES, 'cpu')}")
    device = measured_cpu() if name == "cpu" else DEVICES[name]
    if not rates:
        return device
    return replace(device, **rates, source=f"{device.source}; given: {', '.join(rates)}")


def measured_cpu() -> Device:
    """This machine's CPU, float32, within about a second: one product, one copy, and dense attention of 2048 tokens.

    MoBA's rates are set to dense attention's, the gate's to that of products, and what selections move to a copy's: a
    bound, which the blockwise engine comes near at long lengths (docs/benchmarks.md has its measured times).
    """
    square, flat = torch.randn(1024, 1024), torch.randn(1 << 24)
    matmul = 2 * 1024**3 / _seconds(lambda: square @ square)
    copy = 2 * flat.numel() * 4 / _seconds(flat.clone)
    states = [torch.randn(1, 4, 2048, 64, requires_grad=True) for _ in range(3)]
    flops = 4 * 64 * 4 * 2048**2 / 2

    def attend():
        return torch.nn.functional.scaled_dot_product_attention(*states, is_causal=True)

    with torch.no_grad():
        forward = flops / _seconds(attend)
    output = attend()
    backward = 2.5 * flops / _seconds(lambda: torch.autograd.grad(output.sum(), states, retain_graph=True))
    memory = float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    return Device(
        "cpu", memory, matmul, forward, forward, backward, matmul, forward, backward, copy, copy, copy, 0.0,
        source="product, copy and dense attention measured here just now; MoBA's rates assumed equal to dense's",
    )  # fmt: skip


def _seconds(run, repeats: int = 3) -> float:
    """The best of a few, after one that warms up: other work on the machine only ever adds time."""
    run()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times)
