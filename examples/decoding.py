"""Decodes a batch of prompts of different lengths with a static cache, compiled once.

    python examples/decoding.py [--device cuda] [--batch 8] [--steps 64] [--cache 4096] [--compiler inductor]

The cache has one size from the first token to the last, and a key mask says how much of each row is filled, so that
neither the compiler nor CUDA graphs see a new shape. What the mask hides is not read: a step costs what is in the
cache, not what would fit. With one query, a GPU is filled by splitting the keys over programs.
"""

from __future__ import annotations

import argparse
import sys
import time

import torch
from torch import Tensor, nn

from flash_attend import flash_attention


class Decoder(nn.Module):
    """One attention layer with grouped heads over a vocabulary, and its cache."""

    def __init__(self, batch: int, cache: int, vocabulary: int, heads: int = 8, kv_heads: int = 2, d: int = 64) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.d = heads, kv_heads, d
        self.embedding = nn.Embedding(vocabulary, heads * d)
        self.project = nn.Linear(heads * d, (heads + 2 * kv_heads) * d, bias=False)
        self.predict = nn.Linear(heads * d, vocabulary, bias=False)
        self.register_buffer("k", torch.zeros(batch, kv_heads, cache, d))
        self.register_buffer("v", torch.zeros(batch, kv_heads, cache, d))

    def _split(self, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q `(b, h, i, d)`, k and v `(b, hk, i, d)` of tokens `(b, i)`."""
        heads = self.project(self.embedding(tokens)).unflatten(2, (-1, self.d)).transpose(1, 2)
        return heads.split((self.heads, self.kv_heads, self.kv_heads), dim=1)

    def _next(self, out: Tensor) -> Tensor:
        return self.predict(out.transpose(1, 2).flatten(2)).argmax(dim=2)

    def read(self, tokens: Tensor) -> Tensor:
        """The token after each of whole sequences `(b, i)`, without a cache."""
        return self._next(flash_attention(*self._split(tokens), causal=True))

    def prefill(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        """Fills the cache from prompts `(b, i)`, padded on the right, and gives the token after each `(b, 1)`."""
        q, k, v = self._split(tokens)
        self.k[:, :, : tokens.shape[1]], self.v[:, :, : tokens.shape[1]] = k, v
        shown = torch.arange(tokens.shape[1], device=tokens.device) < lengths[:, None]
        return self._next(flash_attention(q, k, v, mask=shown, causal=True)).gather(1, lengths[:, None] - 1)

    def step(self, token: Tensor, lengths: Tensor) -> Tensor:
        """Appends tokens `(b, 1)` to rows that are `lengths (b,)` long, and gives the next ones `(b, 1)`."""
        q, k, v = self._split(token)
        at = lengths[:, None, None, None].expand(-1, self.kv_heads, 1, self.d)
        self.k.scatter_(2, at, k)
        self.v.scatter_(2, at, v)
        filled = torch.arange(self.k.shape[2], device=token.device) <= lengths[:, None]
        return self._next(flash_attention(q, self.k, self.v, mask=filled))


def main(arguments: list[str] | None = None) -> int:
    """Decodes, and compares with what the whole sequences give at once. The exit code is 1 if a token differs."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--compiler", default="inductor", help="backend of torch.compile, default inductor")
    for name, default in dict(batch=8, steps=64, prompt=100, cache=4096).items():
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args(arguments)
    if options.prompt + options.steps > options.cache:
        parser.error(f"{options.prompt} and {options.steps} tokens do not fit into a cache of {options.cache}")

    torch.manual_seed(0)
    with torch.no_grad():
        model = Decoder(options.batch, options.cache, vocabulary=512).to(options.device)
        tokens = torch.randint(512, (options.batch, options.prompt)).to(options.device)
        lengths = torch.randint(1, options.prompt + 1, (options.batch,)).to(options.device)
        step = torch.compile(model.step, backend=options.compiler, fullgraph=True)
        found = [model.prefill(tokens, lengths)]
        start = time.perf_counter()
        for done in range(options.steps - 1):
            found.append(step(found[-1], lengths + done))
        decoded, wrong = torch.cat(found, dim=1), 0
        found[-1].tolist()  # waits for all of them
        seconds = time.perf_counter() - start
        for row, length in enumerate(lengths.tolist()):  # each again, as one sequence without padding
            whole = torch.cat((tokens[row, :length], decoded[row]))
            wrong += int((model.read(whole[None])[0, length - 1 : -1] != decoded[row]).sum())
    print(f"{decoded.numel()} tokens in {seconds:.1f} s, compiling included; {wrong} are not those of whole sequences")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
