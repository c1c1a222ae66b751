"""A padded, causal batch, forward and backward: PyTorch's attention with a mask beside ours.

    python examples/quickstart.py [--device cuda] [--batch 4] [--length 1024] [--dtype bfloat16]

Prints who serves, how far the two are apart, and the milliseconds and the peak memory of each.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time

import torch
import torch.nn.functional as F
from torch import Tensor

from flash_attend import explain, flash_attention
from flash_attend.testing.memory import peak_bytes

HEADS, DIM, ROUNDS = 4, 64, 7
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}


def of_torch(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """PyTorch's attention takes causality and padding together as an array `(b, 1, i, j)`."""
    causal = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril()
    return F.scaled_dot_product_attention(q, k, v, attn_mask=causal & mask[:, None, None, :])


def ours(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return flash_attention(q, k, v, mask=mask, causal=True)


def main(arguments: list[str] | None = None) -> int:
    """The exit code is 1 if the two do not agree."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="float32", choices=[str(x).removeprefix("torch.") for x in TOLERANCE])
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=1024, help="of the longest sequence; the others are shorter")
    options = parser.parse_args(arguments)

    torch.manual_seed(0)
    device, dtype = torch.device(options.device), getattr(torch, options.dtype)
    shape = options.batch, HEADS, options.length, DIM
    q, k, v = (torch.randn(shape, device=device, dtype=dtype, requires_grad=True) for _ in range(3))
    lengths = torch.linspace(options.length, options.length // 4, options.batch, device=device)
    # (b, j), True = a token; padded on the left, as for generating.
    mask = torch.arange(options.length, device=device) >= options.length - lengths[:, None]
    grad = torch.randn(shape, device=device, dtype=dtype) * mask[:, None, :, None]  # nothing is learned of padding
    print(explain(q, k, v, mask=mask, causal=True), end="\n\n")

    results = {}
    for attend in (of_torch, ours):

        def step(attend=attend) -> tuple[Tensor, ...]:
            out = attend(q, k, v, mask)
            return out * mask[:, None, :, None], *torch.autograd.grad(out, (q, k, v), grad)

        results[attend.__name__], seconds = step(), []  # the first call compiles, on a GPU
        for _ in range(ROUNDS):
            start = time.perf_counter()
            step()[0].detach().sum().item()  # waits for the device
            seconds.append(time.perf_counter() - start)
        peak = peak_bytes(step, device) / 1e6
        print(f"{attend.__name__:<9}{1e3 * statistics.median(seconds):8.1f} ms{peak:9.1f} MB")
    pairs = zip(*results.values(), strict=True)
    apart = max(((a - b).abs().max() / a.abs().max()).item() for a, b in pairs)
    print(f"largest difference of output and gradients: {apart:.0e} of the largest number")
    return 0 if apart <= TOLERANCE[dtype] else 1


if __name__ == "__main__":
    sys.exit(main())
