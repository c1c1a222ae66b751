"""transformers' models on our attention: what "eager" and "sdpa" compute, for tiny ones with random weights."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import Any, NamedTuple

import pytest
import torch
import transformers as hf
from torch import Tensor

from flash_attend.integrations import huggingface

VOCABULARY, TOKENS, WINDOW = 60, 24, 7
SIZES = dict(hidden_size=32, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4, vocab_size=VOCABULARY)
GROUPED = dict(**SIZES, num_key_value_heads=2, head_dim=16, pad_token_id=0, bos_token_id=1, eos_token_id=None)
LAYERS = dict(sliding_window=WINDOW, layer_types=["sliding_attention", "full_attention"])
ENCODING = dict(**SIZES, pad_token_id=0, bos_token_id=1, eos_token_id=2)
BART = dict(
    d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4,
    encoder_ffn_dim=40, decoder_ffn_dim=40, vocab_size=VOCABULARY, pad_token_id=0, bos_token_id=1, eos_token_id=None,
    decoder_start_token_id=1, forced_eos_token_id=None,
)  # fmt: skip
T5 = dict(
    d_model=32, d_kv=8, d_ff=40, num_layers=2, num_heads=4, vocab_size=VOCABULARY, decoder_start_token_id=0,
    relative_attention_num_buckets=8, relative_attention_max_distance=20, eos_token_id=None,
)  # fmt: skip


class Family(NamedTuple):
    """A kind of models."""

    model: type
    config: Callable[[], Any]
    generates: bool = True
    sdpa: bool = True  # "sdpa" serves it
    takes: str = "tokens"


FAMILIES = {
    "llama": Family(hf.LlamaForCausalLM, partial(hf.LlamaConfig, **GROUPED)),
    "qwen3": Family(hf.Qwen3ForCausalLM, partial(hf.Qwen3Config, **GROUPED)),
    "mistral": Family(hf.MistralForCausalLM, partial(hf.MistralConfig, **GROUPED, sliding_window=WINDOW)),
    "gemma2": Family(
        hf.Gemma2ForCausalLM,
        partial(hf.Gemma2Config, **GROUPED, **LAYERS, query_pre_attn_scalar=9, attn_logit_softcapping=2.0),
        sdpa=False,
    ),
    "gemma3": Family(hf.Gemma3ForCausalLM, partial(hf.Gemma3TextConfig, **GROUPED, **LAYERS)),
    "gpt_oss": Family(
        hf.GptOssForCausalLM,
        partial(hf.GptOssConfig, **GROUPED, **LAYERS, num_local_experts=2, num_experts_per_tok=1),
        sdpa=False,
    ),
    "bert": Family(hf.BertForMaskedLM, partial(hf.BertConfig, **ENCODING), generates=False),
    "modernbert": Family(
        hf.ModernBertForMaskedLM,
        partial(hf.ModernBertConfig, **ENCODING, local_attention=6, global_attn_every_n_layers=2),
        generates=False,
    ),
    "bart": Family(hf.BartForConditionalGeneration, partial(hf.BartConfig, **BART), takes="pairs"),
    "t5": Family(hf.T5ForConditionalGeneration, partial(hf.T5Config, **T5), takes="pairs"),
    "whisper": Family(
        hf.WhisperForConditionalGeneration,
        partial(hf.WhisperConfig, **BART, num_mel_bins=8, max_source_positions=12, suppress_tokens=None,
                begin_suppress_tokens=None),
        takes="sound",
    ),
    "vit": Family(
        hf.ViTForImageClassification,
        partial(hf.ViTConfig, **{**SIZES, "vocab_size": None}, image_size=16, patch_size=4),
        generates=False,
        takes="images",
    ),
}  # fmt: skip
ESSENTIAL = ("llama", "gemma2", "gpt_oss", "modernbert", "t5")  # what differs: these take seconds, the rest does too
PADDINGS = ("none", "right", "left")


def families(*wanted: str) -> Any:
    """For `parametrize`: those that are not essential are for `make test-clients`."""
    names = wanted or tuple(FAMILIES)
    marked = [pytest.param(name, marks=() if name in ESSENTIAL else pytest.mark.clients) for name in names]
    return pytest.mark.parametrize("name", marked)


GENERATING = [name for name, family in FAMILIES.items() if family.generates]


@pytest.fixture(autouse=True, scope="module")
def _registered() -> Iterator[None]:
    huggingface.register()
    huggingface.register("attend-math", backend="math")
    hf.logging.set_verbosity_error()
    yield


@cache
def built(name: str) -> Any:
    """A model in evaluation, with weights large enough that masks matter."""
    torch.manual_seed(0)
    model = FAMILIES[name].model(FAMILIES[name].config()).eval()
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            if path.endswith("sinks"):
                parameter.normal_()
            elif parameter.ndim > 1 and name != "t5":  # whose weights are not small
                parameter.mul_(5)
    return model


def inputs_of(name: str, padding: str, length: int = TOKENS) -> dict[str, Tensor]:
    """Two entries, the second of them padded."""
    generator = torch.Generator().manual_seed(1)
    takes = FAMILIES[name].takes
    if takes == "images":
        return dict(pixel_values=torch.randn(2, 3, 16, 16, generator=generator))
    if takes == "sound":
        return dict(input_features=torch.randn(2, 8, 24, generator=generator))
    tokens = torch.randint(3, VOCABULARY, (2, length), generator=generator)
    if padding == "none":
        return dict(input_ids=tokens)
    shown = torch.arange(length) < torch.tensor([[length], [length - 9]])
    shown = shown if padding == "right" else shown.flip(1)
    return dict(input_ids=tokens.masked_fill(~shown, 0), attention_mask=shown.long())


def forward(model: Any, name: str, inputs: dict[str, Tensor]) -> Tensor:
    """The logits at places that are no padding."""
    decoded = {}
    if FAMILIES[name].takes in ("pairs", "sound"):
        decoded = dict(decoder_input_ids=torch.arange(3, 14).repeat(2, 1))
    logits = model(**inputs, **decoded).logits
    if "attention_mask" in inputs and not decoded:
        return logits[inputs["attention_mask"].bool()]
    return logits


def with_gradients(model: Any, name: str, inputs: dict[str, Tensor]) -> tuple[Tensor, ...]:
    logits = forward(model, name, inputs)
    weights = torch.linspace(-1, 1, logits.numel()).reshape(logits.shape)
    leaves = [parameter for parameter in model.parameters() if parameter.requires_grad]
    grads = torch.autograd.grad(logits, leaves, weights, allow_unused=True, materialize_grads=True)
    return logits.detach(), *grads


def close(ours: Any, theirs: Any) -> None:
    for x, y in zip(ours, theirs, strict=True):
        assert (x - y).abs().max() <= 2e-5 * y.abs().max().clamp(min=1.0)


def others(name: str) -> tuple[str, ...]:
    return ("eager", "sdpa") if FAMILIES[name].sdpa else ("eager",)


@families()
@pytest.mark.parametrize("padding", PADDINGS)
def test_logits_and_gradients(name: str, padding: str) -> None:
    if padding != "none" and FAMILIES[name].takes in ("images", "sound"):
        return
    model, inputs = built(name), inputs_of(name, padding)
    model.set_attn_implementation("attend")
    ours = with_gradients(model, name, inputs)
    for implementation in others(name):
        model.set_attn_implementation(implementation)
        close(ours, with_gradients(model, name, inputs))


@families(*GENERATING)
@pytest.mark.parametrize("how", ("dynamic", "static", "beams"))
def test_generation(name: str, how: str) -> None:
    """The same tokens, and the scores that they were chosen by."""
    model, inputs = built(name), inputs_of(name, "left")
    options: dict[str, Any] = dict(max_new_tokens=12, min_new_tokens=12, do_sample=False, return_dict_in_generate=True)
    options |= dict(static=dict(cache_implementation="static"), beams=dict(num_beams=3)).get(how, {})

    def generated(implementation: str) -> Any:
        model.set_attn_implementation(implementation)
        return model.generate(**inputs, **options, output_scores=True, pad_token_id=0)

    ours = generated("attend")
    for implementation in others(name):
        theirs = generated(implementation)
        assert torch.equal(ours.sequences, theirs.sequences)
        finite = [score.isfinite() for score in theirs.scores]
        close([x[f] for x, f in zip(ours.scores, finite, strict=True)],
              [x[f] for x, f in zip(theirs.scores, finite, strict=True)])  # fmt: skip


@families()
def test_compiled(name: str) -> None:
    """In one graph, in which our operators stand."""
    padding = "none" if FAMILIES[name].takes in ("images", "sound") else "left"
    model, inputs = copy.deepcopy(built(name)), inputs_of(name, padding)
    model.set_attn_implementation("eager")
    theirs = with_gradients(model, name, inputs)
    model.set_attn_implementation("attend")
    graphs: list[str] = []

    def keep(graph: torch.fx.GraphModule, _: Any) -> Callable:
        graphs.append(str(graph.graph))
        return graph.forward

    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend=keep)
    close(with_gradients(compiled, name, inputs), theirs)
    assert len(graphs) == 1
    assert "flash_attend" in graphs[0]
