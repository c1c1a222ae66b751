"""Draws which tiles a forward visits under some masks: the pictures of README.md and docs/masks.md.

python docs/draw_tiles.py
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from flash_attend.testing.oracle import visible_pairs

HERE = Path(__file__).resolve().parent
LENGTH, TILE = 96, 8
SKIPPED, MASKED, WHOLE = range(3)
KINDS = ("not visited", "visited, pair by pair", "visited whole")
COLOURS = ("#f2f2f2", "#f4a259", "#2a6f97")

keys = torch.arange(LENGTH)
padded = keys[None] < 56  # (b, j)
documents = (keys[:, None] // 28 == keys // 28)[None, None]  # (b, 1, i, j)

# What the panels show: the options of a call.
PICTURES: dict[str, dict[str, dict[str, Any]]] = {
    "tiles": {
        "a dense mask, given to SDPA": dict(),
        "causal": dict(causal=True),
        "causal with key padding": dict(mask=padded, causal=True),
    },
    "masks": {
        "key padding on the right": dict(mask=padded),
        "key padding on the left, causal": dict(mask=padded.flip(1), causal=True),
        "a window of 20 keys, causal": dict(causal=True, window=(20, 0)),
        "documents: a 4-D mask": dict(mask=documents),
    },
}


def kinds_of_tiles(options: dict[str, Any]) -> torch.Tensor:
    """What becomes of each tile: `(query tiles, key tiles)` of SKIPPED, MASKED and WHOLE."""
    options = {"mask": None, "causal": False, **options}
    pairs = visible_pairs(1, 1, LENGTH, LENGTH, device=torch.device("cpu"), **options)[0, 0]
    tiles = pairs.view(LENGTH // TILE, TILE, -1, TILE).transpose(1, 2).flatten(2)
    return torch.where(tiles.all(2), WHOLE, torch.where(tiles.any(2), MASKED, SKIPPED))


def draw(panels: dict[str, dict[str, Any]], path: Path) -> None:
    """One panel for each call, queries downwards, keys to the right."""
    figure = Figure(figsize=(2.6 * len(panels) + 0.4, 3.2), layout="constrained")
    for axes, (title, options) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        kinds = kinds_of_tiles(options)
        axes.pcolormesh(kinds, cmap=ListedColormap(COLOURS), vmin=0, vmax=2, edgecolor="white", linewidth=0.8)
        shares = (kinds > SKIPPED).double().mean()
        axes.set(title=f"{title}\n{shares:.0%} of the tiles", xlabel="keys", ylabel="queries", xticks=(), yticks=())
        axes.title.set_fontsize(9)
        axes.invert_yaxis()
        axes.set_aspect("equal")
    handles = [Patch(color=colour, label=kind) for colour, kind in zip(COLOURS, KINDS, strict=True)]
    figure.legend(handles=handles, loc="outside lower center", ncols=3 if len(panels) > 1 else 1, fontsize=8)
    figure.savefig(path, dpi=110, bbox_inches="tight")


if __name__ == "__main__":
    for name, panels in PICTURES.items():
        draw(panels, HERE / f"{name}.png")
