"""Trains on texts of different lengths, packed one after another without padding, and in a padded batch.

    python examples/packed.py [--device cuda] [--texts 32] [--steps 5] [--heads 4] [--d 64]

The texts are paragraphs of Python's own sources, byte by byte; the attention has the sizes of a layer of
complex-valued-transformer, `dv = 2 d`. Each text sees itself alone, and only what came before. Everything but the
attention works on tokens one by one: packed, it is given no padding either.
"""

from __future__ import annotations

import argparse
import sys
import sysconfig
import time
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence

from flash_attend import flash_attention, flash_attention_packed


class Layer(nn.Module):
    """Predicts each next byte by one layer of attention."""

    def __init__(self, heads: int, d: int) -> None:
        super().__init__()
        self.sizes = (heads, d), (heads, d), (heads, 2 * d)
        self.embedding = nn.Embedding(256, heads * d)
        self.project = nn.Linear(heads * d, 4 * heads * d, bias=False)
        self.predict = nn.Linear(2 * heads * d, 256, bias=False)

    def split(self, tokens: Tensor) -> list[Tensor]:
        """q, k `(..., h, d)` and v `(..., h, 2 d)` of tokens `(...)`."""
        parts = self.project(self.embedding(tokens)).split([heads * dim for heads, dim in self.sizes], dim=-1)
        return [part.unflatten(-1, size) for part, size in zip(parts, self.sizes, strict=True)]

    def packed(self, tokens: Tensor, cu_seqlens: Tensor, longest: int) -> Tensor:
        """Logits `(t, 256)` of tokens `(t,)`."""
        places = cu_seqlens, cu_seqlens, longest, longest
        return self.predict(flash_attention_packed(*self.split(tokens), *places, causal=True).flatten(1))

    def padded(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """Logits `(b, n, 256)` of tokens `(b, n)`, padded where the mask `(b, n)` is False."""
        q, k, v = (part.transpose(1, 2) for part in self.split(tokens))
        return self.predict(flash_attention(q, k, v, mask=mask, causal=True).transpose(1, 2).flatten(2))


def texts_of(count: int, longest: int) -> list[Tensor]:
    """So many paragraphs, as bytes, of two to `longest + 1` each."""
    source = (Path(sysconfig.get_path("stdlib")) / "argparse.py").read_bytes()
    paragraphs = [part[: longest + 1] for part in source.split(b"\n\n") if len(part) > 1]
    return [torch.tensor(list(part)) for part in paragraphs[:count]]


def main(arguments: list[str] | None = None) -> int:
    """Trains both ways from the same weights. The exit code is 1 if the losses differ by more than rounding."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    for name, default in dict(texts=32, steps=5, longest=1024, heads=4, d=64).items():
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args(arguments)
    texts = [text.to(options.device) for text in texts_of(options.texts, options.longest)]
    inputs, targets = [text[:-1] for text in texts], torch.cat([text[1:] for text in texts])
    lengths = torch.tensor([len(text) for text in inputs], device=options.device)
    cu_seqlens = nn.functional.pad(lengths.cumsum(0), (1, 0))
    longest = max(map(len, inputs))
    batch = pad_sequence(inputs, batch_first=True)
    mask = torch.arange(longest, device=options.device) < lengths[:, None]
    ways = {
        "packed": lambda layer: layer.packed(torch.cat(inputs), cu_seqlens, longest),
        "padded": lambda layer: layer.padded(batch, mask)[mask],
    }
    losses: dict[str, list[float]] = {}
    for name, logits in ways.items():
        torch.manual_seed(0)
        layer = Layer(options.heads, options.d).to(options.device)
        optimizer = torch.optim.Adam(layer.parameters(), lr=3e-3)
        start, losses[name] = time.perf_counter(), []
        for _ in range(options.steps):
            loss = cross_entropy(logits(layer), targets)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses[name].append(loss.item())
        seconds = time.perf_counter() - start
        tokens = len(targets) if name == "packed" else batch.numel()
        print(f"{name}: {tokens} tokens a step, {seconds:.1f} s, loss {losses[name][0]:.4f} to {losses[name][-1]:.4f}")
    same = torch.allclose(torch.tensor(losses["packed"]), torch.tensor(losses["padded"]), rtol=1e-3)
    print("the losses are the same" if same else f"the losses differ: {losses}")
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
