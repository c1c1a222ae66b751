"""Mistakes of which nothing comes, and why: what `mutants.py` does not find has its reason here."""

from __future__ import annotations

import re
from dataclasses import dataclass

from mutants import Subject

__all__ = ["HARMLESS", "Harmless", "reason_for"]


@dataclass(frozen=True)
class Harmless:
    """In which statements, in words as `Place` has them, a mistake may go unnoticed. Regular expressions."""

    mistakes: str
    where: str
    reason: str
    subjects: str = ""


def reason_for(subject: Subject, mistake: str, where: str) -> Harmless | None:
    return next(
        (
            row
            for row in HARMLESS
            if re.fullmatch(row.mistakes, mistake)
            and re.search(row.where, where)
            and re.search(row.subjects, str(subject))
        ),
        None,
    )


WARPS = "barrier of some warps dropped"
EARLY = "arrival before the products are through"
HOPPER = "hopper_"

SM_80 = r"^(forward|backward_\w+)_kernel of sm_80"
SM_90 = r"^(forward|backward_\w+)_kernel of sm_90"

HARMLESS = (
    # The plain kernels
    Harmless(
        "barrier dropped", r"_load_part|in tl\.range",
        "a round ends with one behind what it reads, and the next comes before the first access",
        SM_80,
    ),
    Harmless("wait for one group less", r"in tl\.range", "at the end, where nobody reads what comes", SM_80),
    Harmless(
        "commit dropped", r"_load_part|QueryStatistics\.load: return",
        "the next group, waited for at the same point, holds both", SM_80,
    ),
    Harmless(
        "bound off by one", r"for block in tl\.range", "a block more is copied, which there is and nobody reads", SM_80
    ),
    Harmless(
        "bound off by one", r"in tl\.range\(0, walk\.masked_count", "no tile has one masked block; another call's have",
        r"^(forward|backward_\w+)_kernel of .* several runs",
    ),
    Harmless(
        "nothing hidden", r"grad_q = clear_rows|total = gl\.where\(alive",
        "the gradients of a dead row's scores are 0, and no key that others see is infinite", "backward_q",
    ),
    Harmless(
        "barrier dropped", r"MASKED=False > _tile: .*(self\.source\.load|> Tile\.accumulate: )",
        "three stand between the wait for a round's products and the copies to where their operands were, and as many "
        "between the first mbarrier and its first use",
        SM_90,
    ),
    Harmless(
        "barrier dropped", r"forward_kernel: for block in tl\.range",
        "who waited for the mbarriers has met the others since, and the next comes before the next copy", SM_90,
    ),
    Harmless(
        "barrier dropped", r"MASKED=True > _tile: v = .*> clear_rows:", "a thread clears what it alone has read",
        SM_90,
    ),
    Harmless(
        "fence dropped", r"MASKED=True > _tile: applied = .*inner_products",
        "q was fenced in front of the full blocks, and v is where it is stored", SM_90,
    ),
    Harmless(
        "products (waited for later|not committed)",
        r"forward_kernel: for block in tl\.range|MASKED=False > _tile: return tile\.accumulate",
        "the first masked block waits for all; where there is none, in another call, it matters",
        f"{SM_90}.* several runs",
    ),
    # Between warps and lanes
    Harmless("lanes do not wait", "", "what lanes exchange lies between barriers of whole partitions", HOPPER),
    Harmless(WARPS, r"await_(full|empty|both)", "each warp waits for the mbarrier itself", HOPPER),
    Harmless(WARPS, "_keep_rows", "a thread clears what it alone has read", HOPPER),
    Harmless(WARPS, r"store_wait\(0\)$", "nobody stores there any more", HOPPER),
    Harmless(
        WARPS, r"(_consume|add_product): token = warpgroup_mma|part\.buffer\(\)\.store|store_rows: buffer\.store",
        "a barrier at a release, or a wait, has ordered the same", HOPPER,
    ),
    # What orders the same
    Harmless(
        f"{WARPS}|{EARLY}|wait dropped", r"_step: (k\.release|products = warpgroup_mma_wait)|_fill_block: shared\.k",
        "the producer fills that slot of k after one of v, which is given back later", "hopper_forward",
    ),
    Harmless(
        "wait dropped", r"tile, first, step\).*shared\.v\.at",
        "the producer has waited for q, which the tile before gives back later", "hopper_forward",
    ),
    Harmless(
        f"{WARPS}|wait dropped|one slot for two", r"Turns\.(take|hand_on)",
        "it changes who is first, at which another test looks", "hopper_forward",
    ),
    Harmless(WARPS, r"_consume: rows\.release", "k is given back after every product with q", "hopper_forward"),
    Harmless(
        f"{WARPS}|{EARLY}|arrival twice", r"(_step|_consume_for_k): grad\.release|_step: grad_q, grad_v = ",
        "the producer fills that slot after one of q, which is given back later", "hopper_backward_(wide_)?kernel",
    ),
    Harmless("wait dropped", r"_produce: \S+\.of\(\w+, 0\)\.fill", "that slot is filled once", "hopper_backward"),
    Harmless(
        "initialized for one arrival more", r": (k|v|key_rows), barriers = make_ring.*SLOTS \+ slot",
        "that slot is filled once, and not given back", "hopper_backward_(wide_)?kernel",
    ),
    Harmless(
        "initialized for one arrival more", r": (q|grad), barriers = make_ring.*SLOTS \+ slot",
        "that slot is filled once, and not given back", "hopper_backward_q",
    ),
    Harmless(
        "wait dropped", r"shared\.grad\.at\(step\)\.fill_both",
        "the producer has waited for a slot of q, which is given back later", "hopper_backward_kernel",
    ),
    Harmless(
        WARPS, r"_consume_for_k: shared\.cleared\.meet\(0\) > Meeting\.meet: mbarrier\.arrive",
        "nobody else reads v, and the barrier before the wait orders the same for this consumer", "_wide_kernel",
    ),
    Harmless(
        f"{WARPS}|arrival twice|wait dropped|wait for the other phase", r"shared\.cleared\.meet\(0\)",
        "both meet again before one reads what the other has cleared", "hopper_backward_kernel",
    ),
    Harmless(
        "registers not fenced", "_step: grad_k_token", "the fence before it, too, comes after the last write",
        "hopper_backward_kernel",
    ),
    Harmless("products not committed", "_issue_query_gradient", "the next group holds both", "hopper_backward_kernel"),
    Harmless(
        "nothing hidden", "clear_hidden_gradients", "hidden keys have no weights, and what they hold is cleared",
        "hopper fused",
    ),
    Harmless(
        "shuffle over another lane", "key_tile_of_program|first_live_query", "the steps still reach every lane", HOPPER
    ),
    Harmless(
        "maximum dropped", "query_blocks: begin = |key_blocks: full_end = ",
        "hidden blocks are visited, or pairs looked at that are all visible",
    ),
    Harmless(
        "wait (dropped|for the other phase)|arrival twice", r"_consume_for_v: shared\.cleared\.meet",
        "what this consumer reads it has cleared itself", "_wide_kernel",
    ),
    Harmless(
        "arrival twice", r"_consume_for_k: shared\.cleared\.meet",
        "in these orders the other has cleared its rows; what this one makes of them is hidden", "_wide_kernel",
    ),
    Harmless(
        "wait dropped", r"_consume_for_v: unused\.await_empty",
        "the other consumer gave it back before it stored the last gradients of scores, for which this one has waited",
        "_wide_kernel of .* fused",
    ),
    Harmless(
        "wait (dropped|for the other phase)", r"_consume_for_k: k\.await_full",
        "the other consumer has waited for it, and they meet", "_wide_kernel",
    ),
    Harmless("wait dropped", r"_consume_for_k: grad\.await_full", "that slot has been waited for", "_wide_kernel"),
    # Of this call
    Harmless(
        "one slot for two", r"_consume: clear_hidden.*Meeting\.await_both",
        "every tile begins after an even number of blocks that were cleared", "hopper_forward.* several tiles",
    ),
    Harmless(
        "sums of four warps begin anew", r"CONSUMER, True\) > _step: total_token",
        "of a tile two blocks are masked, and the sum is 0 until the second", "hopper_forward",
    ),
    Harmless(
        "load without its predicate", r"first_block: first = gl\.load|masked_block: listed",
        "what is loaded is there, and then not taken",
    ),
    Harmless(
        "load without its predicate|bound off by one", r"Mask\.first_key: (shown|exists) = ",
        "every head has a block that shows a key, and the plane has all of it", "of .* (several|many) ",
    ),
    Harmless(
        "nothing hidden", r"Softmax\.finish: log2_sum", "a sum of weights is no denormal number, which is scaled there",
    ),
    Harmless("bound off by one", r"for turn in range\(tiles\.count", "every program has a tile", "hopper_forward"),
    Harmless("bound off by one", r"masked_block: block = ", "what is in front of full blocks is listed", HOPPER),
    Harmless(
        "bound off by one", r"first_block: if walk\.masked_count|in range\(n_full\)",
        "of each tile several blocks are masked, and several full; another call's are single",
        "hopper_backward_q.* many",
    ),
    Harmless(
        "no shuffle", r"key_tile_of_program: hides = ",
        "keys that are hidden have been cleared, and their gradients are", "_wide_kernel of .* fused",
    ),
    Harmless(
        "no shuffle", r"key_tile_of_program: (any_key|hides) = ",
        "a tile's first keys tell for all of them; another call's do not", "hopper_backward_(wide_)?kernel.* several",
    ),
    # The gradient of q
    Harmless("wait dropped", r"tile, first, step\)", "that slot has not been filled before", "hopper_backward_q"),
    Harmless(
        "wait dropped", r"_masked_block: (products_token|v\.await_full)|_step: [kv]\.await_full",
        "that slot has been waited for", "hopper_backward_q",
    ),
    Harmless(
        f"{WARPS}|{EARLY}|arrival twice|wait dropped",
        r"v\.release|(_step|_masked_block): grad_weights = warpgroup|_fill_block: shared\.v",
        "the producer fills that slot of v after one of k, which is given back later", "hopper_backward_q.* d64",
    ),
    Harmless(
        f"{EARLY}|{WARPS}", r"_step: (grad_weights = warpgroup|v\.release)",
        "the producer fills that slot of v after one of k, which is given back later", "hopper_backward_q",
    ),
)  # fmt: skip
