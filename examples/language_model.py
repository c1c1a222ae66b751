"""A decoder of x-transformers with ALiBi and grouped heads: steps of training with its own Attend, and with ours.

    pip install x-transformers
    python examples/language_model.py [--device cuda] [--batch 8] [--length 256] [--steps 8]

Prints what `patch` served, both losses of every step, and the seconds of a step.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from copy import deepcopy

import torch
from torch import Tensor, nn
from x_transformers import Decoder, TransformerWrapper

from flash_attend import patch

VOCABULARY = 256


def make_model(length: int) -> nn.Module:
    layers = Decoder(
        dim=128, depth=2, heads=4, attn_kv_heads=2, attn_dim_head=32, alibi_pos_bias=True, alibi_num_heads=4
    )
    return TransformerWrapper(num_tokens=VOCABULARY, max_seq_len=length, attn_layers=layers)


def train(model: nn.Module, tokens: Tensor, mask: Tensor, steps: int) -> tuple[list[float], float]:
    """The loss of every step, and the seconds of the median one."""
    optimizer, losses, seconds = torch.optim.Adam(model.parameters(), lr=1e-3), [], []
    for _ in range(steps):
        start = time.perf_counter()
        logits = model(tokens[:, :-1], mask=mask[:, :-1])
        shown = mask[:, 1:]
        loss = nn.functional.cross_entropy(logits[shown], tokens[:, 1:][shown])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        seconds.append(time.perf_counter() - start)
    return losses, statistics.median(seconds)


def main(arguments: list[str] | None = None) -> int:
    """The exit code is 1 if nothing was served, or the two trainings differ."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    for name, default in dict(batch=8, length=256, steps=8).items():
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args(arguments)

    torch.manual_seed(0)
    own = make_model(options.length).to(options.device)
    ours = deepcopy(own)
    report = patch(ours)
    print(report)
    tokens = torch.randint(VOCABULARY, (options.batch, options.length), device=options.device)
    lengths = torch.linspace(options.length, options.length // 3, options.batch, device=options.device)
    mask = torch.arange(options.length, device=options.device) < lengths[:, None]  # (b, n), True = a token

    (losses, slow), (found, fast) = (train(model, tokens, mask, options.steps) for model in (own, ours))
    for step, pair in enumerate(zip(losses, found, strict=True)):
        print(f"step {step}: loss {pair[0]:.6f} with its own Attend, {pair[1]:.6f} with ours")
    print(f"a step takes {slow:.3f} s with its own Attend, {fast:.3f} s with ours")
    agree = all(abs(a - b) <= 1e-4 * abs(a) for a, b in zip(losses, found, strict=True))
    return 0 if agree and report.replaced else 1


if __name__ == "__main__":
    sys.exit(main())
