"""What a GPU can do at most: copies, random row gather and scatter, matrix products, dense attention.

    python scripts/benchmark_ceilings.py --output runs/ceilings.json

These are the denominators of every efficiency in docs/benchmarks.md. Times are medians by CUDA events over inputs that
rotate, so that no run reads what the last one left in the cache. Needs a CUDA device.
"""

import argparse
import json
from pathlib import Path

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

ROW = 128  # elements of bf16: the 256 bytes of one head of one token


def main(argv: list[str] | None = None) -> dict:
    """Measure and print everything; returns the numbers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[8192, 32768, 65536, 131072])
    parser.add_argument("--output", type=Path)
    options = parser.parse_args(argv)
    if not torch.cuda.is_available():
        raise SystemExit("benchmark_ceilings needs a CUDA device")
    result = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, **memory(), **matmul()}
    result["dense"] = [dense(length) for length in options.lengths]
    print(json.dumps(result, indent=1))
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(result, indent=1))
    return result


def median_ms(run, repeats: int = 20, warm_up: int = 3) -> float:
    """Median time of run(i), by CUDA events; i counts up, so that run can rotate its inputs."""
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
    for i in range(warm_up):
        run(i)
    for i, (start, end) in enumerate(events):
        start.record()
        run(i)
        end.record()
    torch.cuda.synchronize()
    return sorted(start.elapsed_time(end) for start, end in events)[repeats // 2]


def memory() -> dict:
    """GB/s, bytes read plus bytes written: a plain copy, and rows of 256 bytes in random order."""
    rows = 2**23  # 2 GiB
    source = [torch.randn(rows, ROW, device="cuda", dtype=torch.bfloat16) for _ in range(2)]
    target = torch.empty_like(source[0])
    order = torch.randperm(rows, device="cuda")
    moved = 2 * target.numel() * target.element_size() / 1e6
    return {
        "copy_gb_per_s": moved / median_ms(lambda i: target.copy_(source[i % 2])),
        "gather_gb_per_s": moved / median_ms(lambda i: torch.index_select(source[i % 2], 0, order, out=target)),
        "scatter_gb_per_s": moved / median_ms(lambda i: target.index_copy_(0, order, source[i % 2])),
    }


def matmul(size: int = 8192) -> dict:
    """TFLOP/s of a bf16 product of random square matrices."""
    a, b = (torch.randn(size, size, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    return {"matmul_tflop_per_s": 2 * size**3 / median_ms(lambda i: a @ b) / 1e9}


def dense(length: int) -> dict:
    """Causal attention, 16 heads, head_dim 128, batch 2 (setting S1): ms of forward and of forward + backward."""
    shape = (2, 16, length, 128)
    result = {"length": length}
    repeats = 10 if length <= 32768 else 3
    for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION):
        q, k, v = (torch.randn(shape, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
        grad = torch.randn(shape, device="cuda", dtype=torch.bfloat16)

        def forward(_, q=q, k=k, v=v):
            return scaled_dot_product_attention(q, k, v, is_causal=True)

        def both(i, q=q, k=k, v=v, grad=grad):
            torch.autograd.grad(forward(i, q, k, v), (q, k, v), grad)

        with sdpa_kernel(backend):
            with torch.no_grad():
                result[f"{backend.name.lower()}_forward_ms"] = median_ms(forward, repeats, 1)
            result[f"{backend.name.lower()}_both_ms"] = median_ms(both, repeats, 1)
        del q, k, v, grad
    return result


if __name__ == "__main__":
    main()
