"""Trains the demo's model on sequences of which two processes hold half each, and compares with one process.

    python examples/context_parallel.py [--ranks 2] [--length 256] [--steps 5] [--way ring]

Three things change in a training loop: tokens, labels and masks are sharded, embeddings of positions are those of the
shard's positions, and gradients are summed over the ranks. `patch` does the rest.
"""

from __future__ import annotations

import argparse
import inspect
import sys
import tempfile
from collections.abc import Sequence

import torch
import torch.distributed as dist
import torch.multiprocessing as processes
import torch.nn.functional as F
from complex_valued_transformer import ComplexTransformer
from torch import Tensor, nn

from flash_attend import patch
from flash_attend.context_parallel import ContextParallel, sequence_positions, shard_sequence

LAYOUT = "balanced"  # causal attention gives both ends of a sequence half of the work


def build_model() -> ComplexTransformer:
    """The same in every process; its norms let the attention have weight in the losses, as the demo says."""
    torch.manual_seed(0)
    model = ComplexTransformer(num_tokens=256, dim=32, depth=2, heads=4, dim_head=16, causal=True)
    for norm in (model.norm, *(layer[0] for layer in model.layers)):
        nn.init.constant_(norm.gamma, 32)
    return model


def batch(step: int, length: int) -> tuple[Tensor, Tensor, Tensor]:
    """Bytes of a source file `(2, n)`, those that follow, and a key mask that hides the second one's last third."""
    text = torch.frombuffer(bytearray(inspect.getsource(argparse).encode()), dtype=torch.uint8)
    windows = torch.stack([text[start : start + length + 1] for start in (997 * step, 2003 * step + 64)]).long()
    shown = torch.ones(2, length, dtype=torch.bool)
    shown[1, length * 2 // 3 :] = False
    return windows[:, :-1], windows[:, 1:].masked_fill(~shown, -100), shown  # -100: no byte to predict


def train(settings: argparse.Namespace, shared: ContextParallel | None = None) -> list[float]:
    """The loss of each step, the mean over all bytes of the whole sequences."""
    model = build_model()
    patch(model, strict=True, context_parallel=shared)
    if shared is not None:
        positions = sequence_positions(settings.length, shared.group, shared.layout)
        model.rotary_emb.register_forward_pre_hook(lambda module, lengths: (settings.length,))
        model.rotary_emb.register_forward_hook(lambda module, lengths, whole: whole[positions])
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    losses = []
    for step in range(settings.steps):
        tokens, labels, mask = batch(step, settings.length)
        total = (labels != -100).sum()
        if shared is not None:
            tokens, labels, mask = (
                shard_sequence(x, shared.group, shared.layout, dim=1) for x in (tokens, labels, mask)
            )
        logits = model(tokens, mask=mask[:, None, None], return_real_logits=True)
        loss = F.cross_entropy(logits.transpose(1, 2), labels, reduction="sum") / total
        optimizer.zero_grad()
        loss.backward()
        if shared is not None:
            for tensor in (loss.detach(), *(parameter.grad for parameter in model.parameters())):
                dist.all_reduce(tensor, group=shared.group)
        optimizer.step()
        losses.append(loss.item())
    return losses


def run_rank(rank: int, settings: argparse.Namespace, folder: str) -> None:
    """One of the processes; the first one leaves its losses in the folder."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=settings.ranks, init_method=f"file://{folder}/rendezvous")
    losses = train(settings, ContextParallel(dist.group.WORLD, LAYOUT, settings.way))
    if rank == 0:
        torch.save(losses, f"{folder}/losses")
    dist.destroy_process_group()


def main(argv: Sequence[str] | None = None) -> int:
    """Trains both ways; 0 if the losses agree to float32's rounding, 1 if they do not."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, size in (("ranks", 2), ("length", 256), ("steps", 5)):
        parser.add_argument(f"--{name}", type=int, default=size)
    parser.add_argument("--way", choices=("auto", "ring", "heads"), default="ring")
    settings = parser.parse_args(argv)
    torch.set_num_threads(1)
    alone = train(settings)
    with tempfile.TemporaryDirectory() as folder:
        processes.spawn(run_rank, (settings, folder), nprocs=settings.ranks)
        together = torch.load(f"{folder}/losses")
    print("step  one process  together")
    for step, (loss, shared) in enumerate(zip(alone, together, strict=True), start=1):
        print(f"{step:4}  {loss:11.6f}  {shared:8.6f}")
    apart = max(abs(loss - shared) / loss for loss, shared in zip(alone, together, strict=True))
    print(f"apart by at most {apart:.1e} of the loss")
    return 0 if apart < 1e-5 else 1


if __name__ == "__main__":
    sys.exit(main())
