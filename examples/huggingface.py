"""Has a Hugging Face model computed by flash_attend: the same logits, gradients and text as transformers' own.

    python examples/huggingface.py [--device cuda] [--tokens 256] [--new 32]

A small Llama with random weights stands for a model that is loaded. Prompts have different lengths and are padded on
the left; what is padding stays a mask `(b, j)`, and is neither read nor written out as `(b, 1, i, j)`.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, logging

from flash_attend.integrations import huggingface


def padded_prompts(batch: int, tokens: int, vocabulary: int) -> dict[str, Tensor]:
    """Random prompts of different lengths, padded on the left."""
    lengths = torch.linspace(tokens // 4, tokens, batch).long()
    shown = torch.arange(tokens) >= tokens - lengths[:, None]
    prompts = torch.randint(1, vocabulary, (batch, tokens)).masked_fill(~shown, 0)
    return dict(input_ids=prompts, attention_mask=shown.long())


def losses_and_gradients(model: Any, inputs: dict[str, Tensor]) -> tuple[Tensor, list[Tensor]]:
    """One step of training; padding is no target."""
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    loss = model(**inputs, labels=labels).loss
    return loss.detach(), list(torch.autograd.grad(loss, list(model.parameters())))


def results(model: Any, inputs: dict[str, Tensor], new: int) -> dict[str, Any]:
    """What is compared."""
    loss, gradients = losses_and_gradients(model, inputs)
    options = dict(max_new_tokens=new, min_new_tokens=new, do_sample=False, pad_token_id=0)
    return dict(
        loss=loss,
        gradients=torch.cat([gradient.flatten() for gradient in gradients]),
        text=model.generate(**inputs, **options),
        cached=model.generate(**inputs, **options, cache_implementation="static"),
        beams=model.generate(**inputs, **options, num_beams=3),
    )


def main(arguments: list[str] | None = None) -> int:
    """Compares with transformers' use of torch's attention. The exit code is 1 if something differs."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    for name, default in dict(batch=4, tokens=256, new=32).items():
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args(arguments)
    logging.set_verbosity_error()

    torch.manual_seed(0)
    heads = dict(num_attention_heads=8, num_key_value_heads=2, head_dim=32)
    config = LlamaConfig(
        vocab_size=512, hidden_size=128, intermediate_size=256, num_hidden_layers=2, eos_token_id=None, **heads
    )
    model = LlamaForCausalLM(config).to(options.device)  # as `from_pretrained` gives it
    inputs = padded_prompts(options.batch, options.tokens, config.vocab_size)
    inputs = {name: tensor.to(options.device) for name, tensor in inputs.items()}

    huggingface.register()
    found = {}
    for implementation in ("sdpa", "attend"):
        model.set_attn_implementation(implementation)
        found[implementation] = results(model, inputs, options.new)
    theirs, ours = found.values()
    differ = 0
    for what, expected in theirs.items():
        if expected.is_floating_point():
            apart = ((ours[what] - expected).norm() / expected.norm()).item()
            wrong = apart > 1e-5
            print(f"{what:9}  {apart:.1e} apart")
        else:
            wrong = not torch.equal(ours[what], expected)
            print(f"{what:9}  {'other' if wrong else 'the same'} tokens")
        differ += wrong
    return 1 if differ else 0


if __name__ == "__main__":
    sys.exit(main())
