"""What 8 bit save on this machine's GPU: the feed-forward blocks of DeBERTaV3-base with torchao, against bfloat16.

    python experiments/low_bit_products.py --report benchmarks/gpu/low_bit.md

Twelve blocks (768 x 3072, GELU, 3072 x 768; 57 million random weights, more than a cache holds), each compiled and all
recorded in one CUDA graph, so that neither the host nor its launches are in the times. torchao is best beside the
environment (see deploy_benchmark.py). Without a GPU it runs kernel by kernel, in small, to see that it runs.
"""

import argparse
import importlib.util
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from pyro_blora.machine import spin_briefly

spin_briefly()  # before anything imports torch

import torch
from torch import Tensor, nn

from experiments.on_gpu.page import machine
from experiments.studies.scripts import run_script

WIDTH, INNER, BLOCKS = 768, 3072, 12
LOW_BIT = {"W8A8": "Int8DynamicActivationInt8WeightConfig", "W8A16": "Int8WeightOnlyConfig"}  # torchao's names
TOKENS = ((1, 32), (8, 128), (32, 128), (128, 128))  # texts, and tokens of each


class FeedForward(nn.Module):
    def __init__(self, width: int, inner: int):
        super().__init__()
        self.up, self.down = nn.Linear(width, inner), nn.Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(nn.functional.gelu(self.up(x)))


def blocks_of(kind: str, device: str, width: int, inner: int) -> nn.Sequential:
    """The same random weights for every kind; each block compiled by itself, so that they share one compilation."""
    torch.manual_seed(0)
    blocks = nn.Sequential(*(FeedForward(width, inner) for _ in range(BLOCKS))).to(device).eval()
    if kind != "float32":
        blocks.to(torch.bfloat16)
    if kind in LOW_BIT:
        from torchao import quantization

        quantization.quantize_(blocks, getattr(quantization, LOW_BIT[kind])())
    if device == "cuda":
        for block in blocks:
            block.compile(dynamic=False)
    return blocks


def milliseconds(function: Callable[[], Tensor], device: str) -> float:
    """Median of a call; on a GPU replayed from a CUDA graph."""
    if device == "cuda":
        from triton.testing import do_bench_cudagraph

        return do_bench_cudagraph(function, rep=100, return_mode="median")
    taken = []
    for _ in range(5):
        began = time.perf_counter()
        function()
        taken.append(1e3 * (time.perf_counter() - began))
    return statistics.median(taken)


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--report", type=Path, required=True, help="the page")
    parser.add_argument("--low_bit", nargs="*", default=[*LOW_BIT], choices=LOW_BIT, help="beside the plain ones")
    options = parser.parse_args(arguments)
    if options.low_bit and importlib.util.find_spec("torchao") is None:
        parser.error("torchao is not there: the head of experiments/deploy_benchmark.py says how it is installed")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    width, inner, tokens = (WIDTH, INNER, TOKENS) if device == "cuda" else (WIDTH // 4, INNER // 4, TOKENS[:1])
    torch.set_float32_matmul_precision("high")  # TF32, as one would serve
    torch._dynamo.config.cache_size_limit = 64
    kinds = {kind: blocks_of(kind, device, width, inner) for kind in ("float32", "bfloat16", *options.low_bit)}
    told = machine()
    lines = [
        "# Products of 8 bit on a GPU", "",
        f"`{shlex.join(['python', 'experiments/low_bit_products.py', *arguments])}` on {told.pop('card')}; "
        + ", ".join(f"{key} {value}" for key, value in told.items()) + ".", "",
        f"{BLOCKS} feed-forward blocks of {width} and {inner}, by torchao. W8A8: weights by output channel, inputs by "
        "token, both 8 bit; W8A16: weights alone. Milliseconds of a pass over all blocks, in brackets the share of "
        "bfloat16's; then the relative errors against float32.", "",
        f"| texts x tokens | {' | '.join([*kinds, *(f'error of {kind}' for kind in list(kinds)[1:])])} |",
        "|" + "---|" * 2 * len(kinds),
    ]  # fmt: skip
    with torch.inference_mode():
        for texts, length in tokens:
            x = torch.randn(texts * length, width, generator=torch.Generator().manual_seed(1)).to(device)
            inputs = {kind: x if kind == "float32" else x.to(torch.bfloat16) for kind in kinds}
            found = {kind: blocks(inputs[kind]).float() for kind, blocks in kinds.items()}
            taken = {kind: milliseconds(lambda b=b, y=inputs[kind]: b(y), device) for kind, b in kinds.items()}
            cells = [f"{ms:.3f} ({ms / taken['bfloat16']:.2f})" for ms in taken.values()]
            true = found["float32"]
            cells += [f"{(found[kind] - true).norm() / true.norm():.1e}" for kind in list(kinds)[1:]]
            lines.append(f"| {texts} x {length} | {' | '.join(cells)} |")
            print(lines[-1], flush=True)
            options.report.parent.mkdir(parents=True, exist_ok=True)
            options.report.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    run_script(main)
