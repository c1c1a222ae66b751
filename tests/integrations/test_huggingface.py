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
TEXTS = tuple(name for name, family in FAMILIES.items() if family.takes in ("tokens", "pairs"))
GENERATING = tuple(name for name, family in FAMILIES.items() if family.generates)
# What differs between families, once each; all else is for `make test-clients`.
ESSENTIAL = {
    ("llama", "left"), ("gemma2", "left"), ("gpt_oss", "right"), ("modernbert", "right"), ("t5", "left"),
    ("vit", "none"), ("llama", "static"), ("gpt_oss", "static"), ("modernbert", "compiled"),
}  # fmt: skip
MORE = (pytest.mark.clients, pytest.mark.every)


def cases(names: tuple[str, ...], *ways: str) -> list[Any]:
    """For `parametrize`."""
    return [pytest.param(name, way, marks=() if (name, way) in ESSENTIAL else MORE) for name in names for way in ways]


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


@pytest.mark.parametrize(("name", "padding"), cases(tuple(FAMILIES), "none") + cases(TEXTS, "left", "right"))
def test_logits_and_gradients(name: str, padding: str) -> None:
    model, inputs = built(name), inputs_of(name, padding)
    model.set_attn_implementation("attend")
    ours = with_gradients(model, name, inputs)
    for implementation in others(name):
        model.set_attn_implementation(implementation)
        close(ours, with_gradients(model, name, inputs))


@pytest.mark.parametrize(("name", "how"), cases(GENERATING, "dynamic", "static", "beams"))
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
        for x, y in zip(ours.scores, theirs.scores, strict=True):
            assert torch.equal(x.isfinite(), y.isfinite())
            close([x[x.isfinite()]], [y[y.isfinite()]])


@pytest.mark.parametrize(("name", "_"), cases(tuple(FAMILIES), "compiled"))
def test_compiled(name: str, _: str) -> None:
    """In one graph, in which our operators stand."""
    inputs = inputs_of(name, "left" if name in TEXTS else "none")
    model = copy.deepcopy(built(name))
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


@pytest.mark.parametrize(("name", "_"), cases(("llama", "gemma2", "gpt_oss"), "compiled steps"))
def test_compiled_steps_with_a_static_cache(name: str, _: str) -> None:
    """One graph for all steps: how far the cache is filled, the device alone knows."""
    model, inputs = built(name), inputs_of(name, "left")
    shown = inputs["attention_mask"]
    whole = torch.cat((shown, torch.ones(2, 8, dtype=shown.dtype)), dim=1)
    graphs: list[str] = []

    def keep(graph: torch.fx.GraphModule, _: Any) -> Callable:
        graphs.append(str(graph.graph))
        return graph.forward

    def decoded(implementation: str, step: Callable) -> list[Tensor]:
        model.set_attn_implementation(implementation)
        cache = hf.StaticCache(config=model.config, max_cache_len=TOKENS + 8)
        found = [model(**inputs, cache=cache).logits[:, -1]]
        for done in range(3):
            token, at = found[-1].argmax(dim=-1, keepdim=True), shown.sum(dim=1, keepdim=True) + done
            options = dict(input_ids=token, attention_mask=whole, position_ids=at, cache=cache)
            found.append(step(**options).logits[:, -1])
        return found

    torch.compiler.reset()
    with torch.no_grad():
        theirs = decoded("eager", model)
        close(decoded("attend", torch.compile(model, fullgraph=True, backend=keep)), theirs)
    assert len(graphs) == 1 + (name != "llama"), "with sliding layers, one more while their length is no symbol yet"
    assert all("flash_attend" in graph for graph in graphs)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What `flash_attention` is asked for: queries and keys beside the options."""
    found: list[dict[str, Any]] = []

    def told(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        found.append(dict(options, i=q.shape[2], j=k.shape[2]))
        return attend(q, k, v, **options)

    attend = huggingface.flash_attention
    monkeypatch.setattr(huggingface, "flash_attention", told)
    return found


def test_masks_stay_small(calls: list[dict[str, Any]]) -> None:
    """Key padding is `(b, j)`, causality and windows are options, and of a static cache only what is filled is read."""
    model, inputs = built("gemma2"), inputs_of("gemma2", "left")
    model.set_attn_implementation("attend")
    model(**inputs)
    assert [call["mask"].shape for call in calls] == [(2, TOKENS)] * 2
    assert [(call["causal"], call["window"]) for call in calls] == [(True, (WINDOW - 1, 0)), (True, None)]
    assert {call["softcap"] for call in calls} == {2.0}
    calls.clear()
    model.generate(**inputs, max_new_tokens=4, cache_implementation="static", pad_token_id=0)
    prefill, steps = calls[:2], calls[2:]
    assert [(call["i"], call["j"], *call["mask"].shape) for call in prefill] == [(TOKENS, TOKENS, 2, TOKENS)] * 2
    assert {call["i"] for call in steps} == {1}
    assert all(call["mask"].shape == (2, 1, 1, call["j"]) and not call["causal"] for call in steps)
    calls.clear()
    built("bert").set_attn_implementation("attend")
    built("bert")(**inputs)
    assert [(call["mask"].shape, call["causal"]) for call in calls] == [((2, TOKENS), False)] * 2
    calls.clear()
    built("llama").set_attn_implementation("attend")
    built("llama")(inputs["input_ids"])
    assert [(call["mask"], call["causal"]) for call in calls] == [(None, True)] * 2


def test_masks_of_four_dimensions(calls: list[dict[str, Any]]) -> None:
    """A model's own, complete: bool, 0 and the lowest number, or a true bias with a gradient."""
    model, inputs = built("llama"), inputs_of("llama", "none")
    shown = torch.ones(TOKENS, TOKENS, dtype=torch.bool).tril()[None, None].repeat(2, 1, 1, 1)
    shown[1, ..., :5] = False
    lowest = torch.finfo(torch.float32).min
    bias = torch.randn(2, 4, TOKENS, TOKENS, generator=torch.Generator().manual_seed(0)).where(shown, lowest)
    for mask in (torch.zeros(shown.shape).masked_fill(~shown, lowest), bias, shown):
        results = []
        for implementation in ("attend", "sdpa"):
            model.set_attn_implementation(implementation)
            leaf = mask.clone().requires_grad_(mask is bias)
            logits = model(**inputs, attention_mask=leaf).logits[:, 5:]
            grads = torch.autograd.grad(logits.sum(), leaf) if mask is bias else ()
            results.append((logits, *(grad[:, :, 5:] for grad in grads)))
        close(*results)
    model.set_attn_implementation("attend")
    calls.clear()
    model(**inputs, attention_mask=bias)
    assert all(torch.equal(call["bias"].isinf(), ~shown.expand(-1, 4, -1, -1)) for call in calls)
    with pytest.raises(
        ValueError, match=r"attention_mask must be one that transformers made .* got torch.float32 \(2, 24"
    ):
        huggingface._read(torch.zeros(2, TOKENS), model)


@pytest.mark.parametrize("name", ("llama", "gemma2"))
def test_packed_sequences(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With `cu_seq_lens` no mask is read; without, transformers makes one of the positions."""
    model, counted = built(name), []
    attend = huggingface.flash_attention_packed

    def told(*args: Any, **options: Any) -> Tensor:
        counted.append(args[5])
        return attend(*args, **options)

    monkeypatch.setattr(huggingface, "flash_attention_packed", told)
    tokens, lengths = inputs_of(name, "none")["input_ids"][:1], (10, 14)
    ends = torch.tensor([0, 10, 24], dtype=torch.int32)
    packed = dict(cu_seq_lens_q=ends, cu_seq_lens_k=ends, max_length_q=14, max_length_k=14)
    position_ids = torch.cat([torch.arange(length) for length in lengths])[None]
    model.set_attn_implementation("attend")
    model = partial(model, use_cache=False)  # with a cache transformers does not look at positions
    alone = torch.cat([model(part).logits for part in tokens.split(lengths, dim=1)], dim=1)
    assert counted == []
    for options in ({}, packed, dict(packed, max_length_q=torch.tensor(14))):
        counted.clear()
        close([model(tokens, position_ids=position_ids, **options).logits], [alone])
        # One of its two layers leaves it to the config what its window is.
        layers = 0 if not options else 1 if name == "gemma2" else 2
        assert counted == [options.get("max_length_q") if isinstance(options.get("max_length_q"), int) else 24] * layers


def test_dropout_is_on_in_training_alone() -> None:
    config = FAMILIES["llama"].config()
    config.attention_dropout = 0.5
    model = hf.LlamaForCausalLM._from_config(config, attn_implementation="attend")
    inputs = inputs_of("llama", "left")
    assert torch.equal(model.eval()(**inputs).logits, model(**inputs).logits)
    torch.manual_seed(0)
    first, second = model.train()(**inputs).logits, model(**inputs).logits
    torch.manual_seed(0)
    assert torch.equal(first, model(**inputs).logits)
    assert not torch.equal(first, second)


def test_a_backend_by_name(calls: list[dict[str, Any]]) -> None:
    model, inputs = built("llama"), inputs_of("llama", "right")
    model.set_attn_implementation("attend-math")
    ours = forward(model, "llama", inputs)
    assert {call["backend"] for call in calls} == {"math"}
    model.set_attn_implementation("sdpa")
    close([ours], [forward(model, "llama", inputs)])


def test_models_that_never_ask_are_refused() -> None:
    config = hf.BloomConfig(hidden_size=32, n_layer=1, n_head=4, vocab_size=VOCABULARY)
    told = "attn_implementation='attend' cannot serve BloomModel: BloomAttention computes attention by itself"
    with pytest.raises(ValueError, match=told):
        hf.AutoModelForCausalLM.from_config(config, attn_implementation="attend")
    model = hf.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    with pytest.raises(ValueError, match=told):
        model.set_attn_implementation("attend")
    assert model.config._attn_implementation == "eager"
    model(torch.arange(3, 9)[None])


@pytest.mark.parametrize("name", ("flash", "my-sdpa", "org/attend"))
def test_names_of_transformers_own_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="name must not contain"):
        huggingface.register(name)


def test_what_asks_for_another_attention_is_refused() -> None:
    model = built("llama")
    model.set_attn_implementation("attend")
    with pytest.raises(ValueError, match="indices is not served"):
        model(torch.arange(3, 9)[None], indices=torch.zeros(1))
