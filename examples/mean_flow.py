"""A training step of MeanFlow on a padded batch: derivatives that are pushed forward through attention, and gradients.

    python examples/mean_flow.py [--device cuda] [--batch 4] [--length 768] [--steps 3]

A small transformer learns the average velocity `u(z, r, t)` of a flow between noise and data from the identity
`u = v - (t - r) du/dt` (Geng et al. 2025, arXiv:2505.13447). Its training takes `du/dt` along the flow by
`torch.func.jvp` in every step, and no gradient through that. Beside the same with attention as einsums: the losses,
which have to agree, the time of a step, and the memory that it takes at most.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from flash_attend import flash_attention
from flash_attend.testing.memory import peak_bytes

HEADS, DIM, DEPTH, FEATURES = 4, 32, 2, 8
Attention = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def ours(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return flash_attention(q, k, v, mask=mask)


def by_einsum(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    scores = torch.einsum("bhid,bhjd->bhij", q, k) * q.shape[-1] ** -0.5
    weights = scores.masked_fill(~mask[:, None, None], -torch.inf).softmax(dim=-1)
    return torch.einsum("bhij,bhjd->bhid", weights, v)


class Velocity(nn.Module):
    """The average velocity, from time r to t, of what is at z `(b, n, features)` at time t."""

    def __init__(self, attend: Attention) -> None:
        super().__init__()
        width = HEADS * DIM
        self.attend = attend
        self.embed, self.read = nn.Linear(FEATURES + 2, width), nn.Linear(width, FEATURES)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2 * DEPTH))
        self.project = nn.ModuleList(nn.Linear(width, 3 * width) for _ in range(DEPTH))
        self.feed_forward = nn.ModuleList(
            nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)) for _ in range(DEPTH)
        )

    def forward(self, z: Tensor, r: Tensor, t: Tensor, mask: Tensor) -> Tensor:
        times = torch.stack((r, t), dim=-1)[:, None].expand(-1, z.shape[1], -1)
        x = self.embed(torch.cat((z, times), dim=-1))
        for first, second, project, feed in zip(
            self.norms[::2], self.norms[1::2], self.project, self.feed_forward, strict=True
        ):
            q, k, v = project(first(x)).unflatten(-1, (3, HEADS, DIM)).permute(2, 0, 3, 1, 4)
            x = x + self.attend(q, k, v, mask).transpose(1, 2).flatten(2)
            x = x + feed(second(x))
        return self.read(x)


def loss_of(model: Velocity, data: Tensor, noise: Tensor, times: Tensor, mask: Tensor) -> Tensor:
    r, t = times.sort(dim=0).values
    z, v = torch.lerp(data, noise, t[:, None, None]), noise - data
    u, moved = torch.func.jvp(lambda *at: model(*at, mask), (z, r, t), (v, torch.zeros_like(r), torch.ones_like(t)))
    target = v - (t - r)[:, None, None] * moved.detach()
    return (u - target)[mask].square().mean()


def main(arguments: list[str] | None = None) -> int:
    """Trains both from the same weights. The exit code is 1 if the losses differ by more than rounding."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    for name, default in dict(batch=4, length=768, steps=3).items():
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args(arguments)
    device, losses = torch.device(options.device), {}
    lengths = torch.linspace(options.length, options.length // 4, options.batch, device=device)
    mask = torch.arange(options.length, device=device) < lengths[:, None]  # (b, j), True = there is something
    for attend in (by_einsum, ours):
        torch.manual_seed(0)
        model = Velocity(attend).to(device)
        optimizer, kept = torch.optim.Adam(model.parameters(), lr=1e-3), []

        def step(model=model, optimizer=optimizer, kept=kept) -> None:
            data, noise = (torch.randn(*mask.shape, FEATURES, device=device) for _ in range(2))
            loss = loss_of(model, data, noise, torch.rand(2, options.batch, device=device), mask)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            kept.append(loss.item())

        step()  # the first one makes what the optimizer keeps, and compiles on a GPU
        peak, start = peak_bytes(step, device) / 1e6, time.perf_counter()
        for _ in range(options.steps):
            step()
        seconds, losses[attend] = (time.perf_counter() - start) / options.steps, torch.tensor(kept)
        print(f"{attend.__name__:<10}{seconds:7.2f} s a step{peak:9.1f} MB, loss {kept[0]:.4f} to {kept[-1]:.4f}")
    same = torch.allclose(losses[ours], losses[by_einsum], rtol=1e-3)
    print("the losses are the same" if same else f"the losses differ: {losses}")
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
