"""``gka_ops.hf``: generation, padding, caches, saving, training and compilation of GKA models in ``transformers``."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

pytest.importorskip("transformers", reason="needs transformers: pip install gka-ops[transformers]")

import transformers
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, DynamicCache

from gka_ops.hf import GKAAttention, GKACache, GKAConfig, GKAForCausalLM, GKAModel, replace_attention
from gka_ops.hf.cache import GKACacheLayer
from gka_ops.hf.model import CACHE_ARGUMENT
from gka_ops.nn.layer import A_RANGE, DT_RANGE
from tests.helpers.problems import max_error

GKA, ATTENTION = "linear_attention", "full_attention"
PATTERNS = {
    "pure": [GKA, GKA],
    "gka first": [GKA, ATTENTION],
    "attention first": [ATTENTION, GKA],
}
VOCABULARY = 61
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "initializer_range": 0.3,  # large enough that tokens of the context change the next one
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
DOCUMENTATION = Path(__file__).resolve().parents[2] / "docs" / "transformers.md"
ROUNDING = 1e-5
"""Bound on differences of logits of order 5 in fp64 models. Their RMSNorms (Qwen3's, Llama's) round to fp32, 6e-8:
where a sum in another order falls to the other side there, later layers amplify it. A token too many makes it 3."""


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """No progress bars, and no advice, from ``transformers``."""
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    yield
    transformers.logging.set_verbosity(verbosity)


def make_model(pattern: str = "pure", dtype: torch.dtype = torch.float64, **options: Any) -> GKAForCausalLM:
    torch.manual_seed(0)
    layer_types = PATTERNS[pattern]
    config = GKAConfig(**(SIZES | {"num_hidden_layers": len(layer_types), "layer_types": layer_types} | options))
    model = GKAForCausalLM(config).eval().to(dtype)
    remember(model)
    return model


@torch.no_grad()
def remember(model: nn.Module) -> None:
    """Makes the GKA layers of ``model`` remember tens of tokens, unlike their initial values."""
    for module in model.modules():
        if isinstance(module, GKAAttention):
            module.A_log.uniform_(-3, 0)


def make_replaced(name: str, attention: str = "sdpa", layers: tuple[int, ...] = (0, 2)) -> Any:
    """A tiny fp64 Llama or Qwen3 of three layers, some replaced, with new parameters away from their first values."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**SIZES, num_hidden_layers=3)
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval().double()
    model.set_attn_implementation(attention)
    with torch.no_grad():
        for layer in replace_attention(model, layers):
            for parameter in (layer.g_proj.weight, layer.a_proj.weight, layer.b_proj.weight, layer.alpha_proj.weight):
                parameter.normal_(std=0.3)
            for convolution in (layer.q_conv1d, layer.k_conv1d, layer.v_conv1d):
                convolution.weight.add_(torch.randn_like(convolution.weight), alpha=0.3)
    return model


def make_tokens(B: int, T: int, seed: int = 1) -> Tensor:
    return torch.randint(2, VOCABULARY, (B, T), generator=torch.Generator().manual_seed(seed))


def new_cache(model: Any) -> DynamicCache:
    pure = isinstance(model, GKAForCausalLM) and not model.config.attention_layers
    return GKACache(model.config) if pure else DynamicCache(config=model.config)


def run(model: Any, tokens: Tensor, cache: DynamicCache | None = None, **arguments: Any) -> Tensor:
    """Logits, without gradients; ``cache`` is advanced."""
    given = {"use_cache": False} if cache is None else {CACHE_ARGUMENT: cache, "use_cache": True}
    with torch.no_grad():
        return model(tokens, **given, **arguments).logits


def greedy(model: Any, tokens: Tensor, count: int) -> Tensor:
    """``tokens`` continued by the most likely ones, every logit computed from the whole sequence."""
    for _ in range(count):
        tokens = torch.cat((tokens, run(model, tokens)[:, -1:].argmax(-1)), dim=1)
    return tokens


def every_model() -> list[Any]:
    """Ours in each pattern, and replaced ones."""
    ours = [pytest.param(lambda pattern=pattern: make_model(pattern), id=pattern) for pattern in PATTERNS]
    replaced = [
        pytest.param(lambda name=name, a=a: make_replaced(name, a), id=f"{name} {a}")
        for name, a in (("Llama", "sdpa"), ("Qwen3", "eager"))
    ]
    return ours + replaced


# ------------------------------------------------------------------------------------------------------- generation
@pytest.mark.parametrize("make", every_model())
def test_generation_equals_recomputation(make: Any) -> None:
    model, prompt = make(), make_tokens(2, 9)
    expected = greedy(model, prompt, 12)
    assert expected[:, 9:].unique().numel() > 4  # not one token for ever
    assert torch.equal(model.generate(prompt, max_new_tokens=12, do_sample=False), expected)


@pytest.mark.parametrize("make", every_model())
@pytest.mark.parametrize("options", [{"num_beams": 3}, {"do_sample": True, "num_return_sequences": 2}], ids=str)
def test_beams_and_samples_equal_those_without_a_cache(make: Any, options: dict[str, Any]) -> None:
    model, prompt = make(), make_tokens(2, 9)
    found = []
    for use_cache in (True, False):
        torch.manual_seed(3)
        found.append(model.generate(prompt, max_new_tokens=12, use_cache=use_cache, **({"do_sample": False} | options)))
    assert torch.equal(*found)


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("options", [{"prefill_chunk_size": 4}, {"cache_implementation": "static"}], ids=str)
def test_prefill_in_chunks_and_static_caches(pattern: str, options: dict[str, Any]) -> None:
    model, prompt = make_model(pattern), make_tokens(2, 9)
    expected = greedy(model, prompt, 6)
    assert torch.equal(model.generate(prompt, max_new_tokens=6, do_sample=False, **options), expected)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_conversation_continues_its_cache(pattern: str) -> None:
    model, tokens = make_model(pattern), make_tokens(2, 9)
    cache = new_cache(model)
    for turn in range(2):
        mask = torch.ones_like(tokens)  # or generate would take a pad_token_id that the model said for padding
        said = model.generate(tokens, attention_mask=mask, max_new_tokens=5, do_sample=False, **{CACHE_ARGUMENT: cache})
        assert torch.equal(said, greedy(model, tokens, 5))
        tokens = torch.cat((said, make_tokens(2, 4, seed=turn)), dim=1)


def test_beams_reorder_the_memory_of_gka_layers() -> None:
    model, tokens = make_model(), make_tokens(3, 9)
    cache, order = new_cache(model), torch.tensor([2, 0, 0])
    run(model, tokens[:, :8], cache)
    cache.reorder_cache(order)
    expected = run(model, torch.cat((tokens[order, :8], tokens[:, 8:]), dim=1))[:, 8:]
    assert max_error(run(model, tokens[:, 8:], cache), expected) < ROUNDING


def test_assisted_generation_is_refused() -> None:
    model = make_model()
    with pytest.raises((ValueError, NotImplementedError), match="crop"):
        model.generate(make_tokens(1, 9), max_new_tokens=5, do_sample=False, prompt_lookup_num_tokens=2)


# ---------------------------------------------------------------------------------------------------------- padding
@pytest.mark.parametrize("make", every_model())
def test_padded_batch_generates_what_each_prompt_does_alone(make: Any) -> None:
    model, prompt = make(), make_tokens(2, 9)
    mask = torch.ones_like(prompt)
    mask[1, :4] = 0
    found = model.generate(prompt, attention_mask=mask, max_new_tokens=8, do_sample=False)
    assert torch.equal(found[0], greedy(model, prompt[:1], 8)[0])
    assert torch.equal(found[1, 4:], greedy(model, prompt[1:, 4:], 8)[0])


@pytest.mark.parametrize("implementation", ["dynamic", "static"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_padding_is_read_from_the_masks_of_attention(attention: str, implementation: str) -> None:
    model, prompt = make_replaced("Llama", attention), make_tokens(2, 9)
    mask = torch.ones_like(prompt)
    mask[1, :4] = 0
    found = model.generate(
        prompt,
        attention_mask=mask,
        max_new_tokens=4,
        do_sample=False,
        cache_implementation=implementation,
    )
    assert torch.equal(found[1, 4:], greedy(model, prompt[1:, 4:], 4)[0])


@pytest.mark.parametrize("pattern", PATTERNS)
def test_padding_changes_nothing_wherever_it_stands(pattern: str) -> None:
    """Two padded segments and one token, through a cache: logits of real tokens are those of the real tokens alone."""
    model = make_model(pattern)
    rows = ("11111111 10011 1", "00111110 00111 1", "11100001 11110 1", "10100000 00000 1")
    both = torch.tensor([[int(token) for token in row.replace(" ", "")] for row in rows])
    tokens, positions = make_tokens(4, 14), (both.cumsum(1) - 1).clamp(min=0)
    cache, found = new_cache(model), []
    for begin, end in ((0, 8), (8, 13), (13, 14)):
        arguments = {"attention_mask": both[:, :end], "position_ids": positions[:, begin:end]}
        found.append(run(model, tokens[:, begin:end], cache, **arguments))
    logits = torch.cat(found, dim=1)
    whole = run(model, tokens, attention_mask=both, position_ids=positions)
    for row in range(4):
        real = both[row].bool()
        alone = run(model, tokens[row : row + 1, real])[0]
        assert max_error(logits[row, real], alone) < ROUNDING
        assert max_error(whole[row, real], alone) < ROUNDING


@pytest.mark.parametrize("pattern", PATTERNS)
def test_padding_gets_no_gradient(pattern: str) -> None:
    model, tokens = make_model(pattern), make_tokens(2, 9)
    mask = torch.ones_like(tokens)
    mask[1, :4] = 0
    embedded = model.model.embed_tokens(tokens).detach().requires_grad_()
    labels = tokens.clone()
    labels[1, :5] = -100  # the first real token would be predicted from the last of the padding
    model(inputs_embeds=embedded, attention_mask=mask, labels=labels).loss.backward()
    assert embedded.grad is not None
    given = embedded.grad.any(-1)
    given[:, -1] = True  # the last token has nothing to predict
    assert torch.equal(given, mask.bool())


@pytest.mark.parametrize("pattern", PATTERNS)
def test_packed_sequences_equal_separate_ones(pattern: str) -> None:
    model, tokens = make_model(pattern), make_tokens(1, 20)
    position_ids = torch.cat((torch.arange(7), torch.arange(13)))[None]
    cu_seqlens = torch.tensor([0, 7, 20], dtype=torch.int32)
    found = run(model, tokens, position_ids=position_ids, cu_seq_lens_q=cu_seqlens, cu_seq_lens_k=cu_seqlens)
    expected = torch.cat([run(model, part) for part in tokens.split((7, 13), dim=1)], dim=1)
    assert max_error(found, expected) < ROUNDING
    with torch.no_grad():  # with the cache that is made by default
        found = model(tokens, position_ids=position_ids, cu_seq_lens_q=cu_seqlens, cu_seq_lens_k=cu_seqlens).logits
    assert max_error(found, expected) < ROUNDING
    with pytest.raises(ValueError, match="expected cu_seq_lens_q"):
        run(model, tokens, position_ids=position_ids)


# ------------------------------------------------------------------------------------------------------------ cache
def cache_bytes(cache: DynamicCache) -> int:
    """Of every tensor that an attribute of a layer of ``cache`` holds."""
    leaves = torch.utils._pytree.tree_leaves([vars(layer) for layer in cache.layers])
    return sum(leaf.nbytes for leaf in leaves if isinstance(leaf, Tensor))


@pytest.mark.parametrize(("pattern", "constant"), [("pure", True), ("gka first", False)])
def test_memory_of_decoding(pattern: str, constant: bool) -> None:
    model, tokens = make_model(pattern, torch.float32), make_tokens(2, 48)
    cache = new_cache(model)
    sizes = []
    for begin, end in [(0, 8), *((t, t + 1) for t in range(8, 48))]:
        run(model, tokens[:, begin:end], cache)
        sizes.append(cache_bytes(cache))
    assert (len(set(sizes)) == 1) is constant
    buffers = model.model.layers[0].self_attn.init_cache(2)
    layer_bytes = sum(part.nbytes for part in (*buffers[:3], *buffers.state)) + 8  # and its count of tokens
    assert sizes[0] >= layer_bytes * PATTERNS[pattern].count(GKA)
    assert not constant or sizes[0] == layer_bytes * 2


def test_cache_knows_its_length_and_can_be_reset() -> None:
    model, tokens = make_model(), make_tokens(2, 9)
    cache = new_cache(model)
    assert cache.get_seq_length() == 0
    first = run(model, tokens, cache)
    assert cache.get_seq_length() == 9
    cache.reset()
    assert cache.get_seq_length() == 0
    assert torch.equal(run(model, tokens, cache), first)


def test_a_cache_made_by_default_can_be_continued() -> None:
    for pattern in PATTERNS:
        model, tokens = make_model(pattern), make_tokens(2, 9)
        with torch.no_grad():
            cache = model(tokens[:, :8])[CACHE_ARGUMENT]
        assert max_error(run(model, tokens[:, 8:], cache), run(model, tokens)[:, 8:]) < ROUNDING


def test_a_cache_is_not_continued_after_or_under_gradients() -> None:
    for model in (make_model(), make_model("attention first"), make_replaced("Llama")):
        tokens, cache = make_tokens(1, 9), new_cache(model)
        model(tokens[:, :8], **{CACHE_ARGUMENT: cache}).logits.sum().backward()
        with pytest.raises(RuntimeError, match=r"expected torch\.no_grad"):
            run(model, tokens[:, 8:], cache)
        cache = new_cache(model)
        run(model, tokens[:, :8], cache)
        with pytest.raises(RuntimeError, match=r"expected torch\.no_grad"):
            model(tokens[:, 8:], **{CACHE_ARGUMENT: cache})


def test_caches_of_other_models_are_refused() -> None:
    torch.manual_seed(0)
    attention = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, num_hidden_layers=3)).double()
    cache, tokens = new_cache(attention), make_tokens(1, 5)
    run(attention, tokens, cache)
    with pytest.raises(ValueError, match="expected layer 0 of the cache to be empty or to belong to a GKA layer"):
        run(make_replaced("Llama"), tokens, cache)
    model = make_model()
    with pytest.raises(TypeError, match="expected a GKACache"):
        run(model, tokens, DynamicCache(), position_ids=torch.arange(5)[None])
    with pytest.raises(ValueError, match="expected a model without attention"):
        GKACache(make_model("gka first").config)
    with pytest.raises(NotImplementedError, match=r"got crop\(\)"):
        GKACacheLayer(model.model.layers[0].self_attn, 1).crop(-1)


# --------------------------------------------------------------------------------------------------- saving, config
@pytest.mark.parametrize("pattern", ["pure", "gka first"])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saved_model_computes_the_same(tmp_path: Path, pattern: str, tied: bool, dtype: torch.dtype) -> None:
    options = {"tie_word_embeddings": tied, "gka_options": {"num_iter": 7, "conv_size": 3}}
    config = make_model(pattern, **options).config
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.save_pretrained(tmp_path)
    torch.manual_seed(1)  # loading must not depend on what was initialised
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    assert type(loaded) is GKAForCausalLM
    assert type(AutoConfig.from_pretrained(tmp_path)) is GKAConfig
    assert type(AutoModel.from_pretrained(tmp_path, dtype=dtype)) is GKAModel
    assert loaded.state_dict().keys() == model.state_dict().keys()
    for name, parameter in model.state_dict().items():
        assert parameter.dtype == (torch.float32 if name.endswith(("A_log", "dt_bias")) else dtype), name
        assert torch.equal(loaded.state_dict()[name], parameter), name
        assert loaded.state_dict()[name].dtype == parameter.dtype, name
    layer = loaded.model.layers[0].self_attn
    assert (layer.num_iter, layer.conv_size, layer.layer_idx) == (7, 3, 0)
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) is tied
    tokens = make_tokens(2, 20)
    assert torch.equal(run(loaded, tokens), run(model, tokens))
    assert not torch.equal(run(AutoModelForCausalLM.from_config(config, dtype=dtype), tokens), run(model, tokens))


def test_gates_that_a_checkpoint_lacks_are_initialised(tmp_path: Path) -> None:
    """A Qwen3 checkpoint in a GKA model: what both have is loaded, the rest starts as in a new model."""
    torch.manual_seed(0)
    qwen = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**SIZES, num_hidden_layers=2))
    qwen.save_pretrained(tmp_path)
    config = GKAConfig(**SIZES, num_hidden_layers=2, layer_types=PATTERNS["gka first"])
    model = GKAForCausalLM.from_pretrained(tmp_path, config=config)
    layer = model.model.layers[0].self_attn
    assert torch.equal(layer.k_proj.weight, qwen.model.layers[0].self_attn.k_proj.weight)
    assert A_RANGE[0] <= layer.A_log.exp().min() < layer.A_log.exp().max() <= A_RANGE[1]
    assert DT_RANGE[0] * 0.99 < nn.functional.softplus(layer.dt_bias).min() < DT_RANGE[1]
    assert 0 < layer.q_conv1d.weight.std() < 0.5
    assert torch.equal(layer.o_norm.weight, torch.ones(16))
    assert run(model, make_tokens(1, 9)).isfinite().all()


def test_parameters_are_initialised_as_the_layer_and_the_model_do() -> None:
    torch.manual_seed(0)
    model = GKAForCausalLM(GKAConfig(**SIZES, num_hidden_layers=4))
    layers = [layer.self_attn for layer in model.model.layers]
    A = torch.cat([layer.A_log for layer in layers]).exp()
    assert A_RANGE[0] <= A.min() < A.max() <= A_RANGE[1]
    assert A.unique().numel() == 16
    assert all(0 < layer.v_conv1d.weight.std() < 0.5 for layer in layers)
    assert all(abs(layer.q_proj.weight.std() - SIZES["initializer_range"]) < 0.02 for layer in layers)
    assert all(not layer.b_proj.bias.any() for layer in layers)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"layer_types": [GKA, "sliding_attention"]}, ValueError, "got 'sliding_attention'"),
        ({"layer_types": [GKA]}, ValueError, "expected layer_types for num_hidden_layers = 2 layers, got 1"),
        ({"gka_options": {"num_iter": -1}}, ValueError, "expected num_iter >= 0, got -1"),
        ({"gka_options": {"window": 3}}, TypeError, "window"),
    ],
)
def test_configuration_says_what_it_expected(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make_model(**options)


def test_forward_says_what_it_expected() -> None:
    model, tokens = make_model(), make_tokens(2, 5)
    with pytest.raises(ValueError, match="expected either input_ids or inputs_embeds"):
        model(tokens, inputs_embeds=torch.randn(2, 5, 32))
    with pytest.raises(ValueError, match=r"expected attention_mask of shape \[B, S\], got \[2, 1, 5, 5\]"):
        run(model, tokens, attention_mask=torch.ones(2, 1, 5, 5, dtype=torch.bool))
    layer, x = model.model.layers[0].self_attn, torch.randn(2, 5, 32, dtype=torch.float64)
    with pytest.raises(TypeError, match=r"expected attention_mask to be a torch\.Tensor or None, got str"):
        layer(x, attention_mask="left")
    for shape in ([2, 4], [2, 5, 5], [2, 2, 5, 5], [2, 1, 3, 5], [2, 1, 5, 4]):
        with pytest.raises(ValueError, match=r"expected attention_mask of shape \[B, S\] or \[B, 1, T, S\]"):
            layer(x, attention_mask=torch.ones(shape))
    with pytest.raises(ValueError, match="expected cu_seq_lens_q without an attention_mask"):
        layer(x, attention_mask=torch.ones(2, 5), cu_seq_lens_q=torch.tensor([0, 5]))


# --------------------------------------------------------------------------------------------------------- training
def gradients(model: nn.Module, compiled: Any = None, **arguments: Any) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    loss = (model if compiled is None else compiled)(**arguments).loss
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("make", every_model())
@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable:FutureWarning")  # its name before transformers 6
def test_gradient_checkpointing_changes_no_gradient(make: Any, use_reentrant: bool) -> None:
    model, tokens = make().train(), make_tokens(2, 20)
    loss, expected = gradients(model, input_ids=tokens, labels=tokens)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    calls = 0

    def count(*_: object) -> None:
        nonlocal calls
        calls += 1

    model.model.layers[0].self_attn.register_forward_hook(count)
    found_loss, found = gradients(model, input_ids=tokens, labels=tokens)
    assert calls == 2  # once forward, once again for backward
    assert torch.equal(found_loss, loss)
    assert found.keys() == expected.keys() == dict(model.named_parameters()).keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_loss_is_the_cross_entropy_of_the_next_token() -> None:
    model, tokens = make_model("gka first"), make_tokens(2, 9)
    labels = tokens.clone()
    labels[0, 5:] = -100
    logits = run(model, tokens).float()
    expected = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
    assert max_error(model(tokens, labels=labels).loss.detach(), expected) < 1e-6


@pytest.mark.parametrize("pattern", ["gka first"])
def test_compiled_training_has_no_graph_break(pattern: str) -> None:
    model, tokens = make_model(pattern).train(), make_tokens(2, 20)
    mask = torch.ones_like(tokens)
    mask[1, :5] = 0
    torch._dynamo.reset()
    counters.clear()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for arguments in ({}, {"attention_mask": mask}):
        given = {"input_ids": tokens, "labels": tokens, **arguments}
        loss, expected = gradients(model, **given)
        found_loss, found = gradients(model, compiled, **given)
        assert max_error(found_loss, loss) < ROUNDING
        assert max(max_error(found[name], expected[name]) for name in expected) < ROUNDING
    assert not counters["graph_break"]


@pytest.mark.parametrize(("pattern", "graphs"), [("pure", 1), ("gka first", 2)])
def test_compiled_decoding_has_no_graph_break(pattern: str, graphs: int) -> None:
    """Keys and values of attention grow, so that with them a second graph, with dynamic shapes, follows the first."""
    model, tokens = make_model(pattern), make_tokens(2, 20)
    expected = run(model, tokens)
    torch._dynamo.reset()
    counters.clear()
    cache = new_cache(model)
    run(model, tokens[:, :8], cache)
    step = torch.compile(model, fullgraph=True, backend="aot_eager")
    for t in range(8, 20):
        with torch._dynamo.config.patch(error_on_recompile=t >= 7 + graphs + 1):
            assert max_error(run(step, tokens[:, t : t + 1], cache), expected[:, t : t + 1]) < ROUNDING
    assert counters["stats"]["unique_graphs"] == graphs
    assert not counters["graph_break"]


@pytest.mark.parametrize("make", [p for p in every_model() if p.id in ("pure", "gka first", "Llama sdpa")])
def test_generate_compiles_one_graph_for_a_static_cache(make: Any) -> None:
    """What ``generate`` does on a card for ``cache_implementation="static"``, asked to do it here, too."""
    model, prompt = make(), make_tokens(2, 9)
    mask = torch.ones_like(prompt)
    mask[1, :4] = 0
    compile_config = transformers.CompileConfig(fullgraph=True, backend="aot_eager", mode=None)
    compile_config._compile_all_devices = True
    torch._dynamo.reset()
    counters.clear()
    found = model.generate(
        prompt,
        attention_mask=mask,
        max_new_tokens=6,
        do_sample=False,
        cache_implementation="static",
        compile_config=compile_config,
    )
    assert counters["stats"]["unique_graphs"] == 1
    assert torch.equal(found[0], greedy(model, prompt[:1], 6)[0])
    assert torch.equal(found[1, 4:], greedy(model, prompt[1:, 4:], 6)[0])


def test_examples_of_the_documentation_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    names: dict[str, Any] = {}
    blocks = re.findall(r"```python\n(.*?)```", DOCUMENTATION.read_text(), flags=re.DOTALL)
    for block in blocks:
        exec(block, names)
    assert len(blocks) == 4
    assert names["continued"].shape == (2, 40)
    assert names["logits"].shape == (2, 1, 512)
    assert names["cache"].get_seq_length() == 36
    assert names["loss"] > 0
    assert names["weights"].missing == ()
    assert names["y"].shape == (1, 16, 64)


# ------------------------------------------------------------------------------------------------ replaced attention
def test_replaced_layers_may_lack_parts() -> None:
    parts = ("v_conv", "forgetting_gate", "beta_gate", "alpha_connection", "output_gate")
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, num_hidden_layers=2))
    (layer,) = replace_attention(model, [0], **{f"use_{part}": False for part in parts})
    assert layer.A_log is None and layer.g_proj is None and layer.v_conv1d is None
    ids = torch.arange(7)[None]
    assert model(ids, labels=ids).loss.isfinite()


def make_attention_model(name: str) -> transformers.PreTrainedModel:
    """``name`` with three layers, in fp64."""
    config = getattr(transformers, f"{name}Config")(**SIZES, num_hidden_layers=3)
    return getattr(transformers, f"{name}ForCausalLM")(config).double()


@pytest.mark.parametrize("name", ["Llama", "Qwen3"])
def test_replaced_layers_start_from_the_projections(name: str) -> None:
    torch.manual_seed(0)
    model = make_attention_model(name)
    original = copy.deepcopy(model.model.layers[1].self_attn)
    if name == "Qwen3":
        nn.init.uniform_(original.q_norm.weight, 0.5, 2)
        nn.init.uniform_(original.k_norm.weight, 0.5, 2)
        model.model.layers[1].self_attn.load_state_dict(original.state_dict())
    (layer,) = replace_attention(model, [-2], num_iter=9)
    assert model.model.layers[1].self_attn is layer
    assert (layer.num_heads, layer.num_kv_heads, layer.head_dim, layer.num_iter, layer.layer_idx) == (4, 2, 16, 9, 1)
    assert layer.q_proj.weight.dtype == torch.float64
    assert layer.training
    assert torch.equal(layer.v_proj.weight, original.v_proj.weight)
    assert torch.equal(layer.o_proj.weight, original.o_proj.weight)
    x = torch.randn(2, 12, 32, dtype=torch.float64)
    for part in ("q", "k"):
        there = getattr(original, f"{part}_proj")(x).unflatten(-1, (-1, 16))
        there = getattr(original, f"{part}_norm", nn.Identity())(there)
        here = getattr(layer, f"{part}_proj")(x).unflatten(-1, (-1, 16))
        assert max_error(nn.functional.normalize(here, dim=-1), nn.functional.normalize(there, dim=-1)) < 1e-6
        convolution = getattr(layer, f"{part}_conv1d")
        inputs = torch.randn(2, 5, convolution.channels, dtype=torch.float64)
        assert torch.equal(convolution(inputs), nn.functional.silu(inputs))
    time_constants = 1 / nn.functional.softplus(layer.dt_bias)  # at A = 1
    assert torch.equal(layer.A_log, torch.zeros_like(layer.A_log))
    assert 9.9 < time_constants.min() <= time_constants.max() < 1001
    y, weights = layer(x)
    assert weights is None
    assert not y.any()


@pytest.mark.parametrize("name", ["Llama", "Qwen3"])
def test_replaced_layers_learn_from_the_first_step_on(name: str) -> None:
    torch.manual_seed(0)
    model = make_attention_model(name)
    tokens = make_tokens(2, 20)
    new = replace_attention(model, [0, 2])
    optimizer = torch.optim.SGD([p for layer in new for p in layer.parameters()], lr=0.1)
    losses = []
    for step in range(3):
        loss, found = gradients(model, input_ids=tokens, labels=tokens)
        losses.append(loss)
        for index in (0, 2):
            prefix = f"model.layers.{index}.self_attn."
            own = {n.removeprefix(prefix): g for n, g in found.items() if n.startswith(prefix)}
            assert {n for n, g in own.items() if g.any()} == ({"g_proj.weight"} if step == 0 else set(own))
        optimizer.step()
    assert losses[0] > losses[1] > losses[2]


def test_a_replaced_qwen3_loads_into_a_gka_model() -> None:
    model, tokens = make_replaced("Qwen3"), make_tokens(2, 12)
    config = GKAConfig(**SIZES, num_hidden_layers=3, layer_types=[GKA, ATTENTION, GKA])
    other = GKAForCausalLM(config).double().eval()
    assert not torch.equal(run(other, tokens), run(model, tokens))
    other.load_state_dict(model.state_dict())
    assert max_error(run(other, tokens), run(model, tokens)) < ROUNDING


class OtherNorm(nn.LayerNorm):
    """No RMSNorm."""


def test_replacement_says_what_it_expected() -> None:
    torch.manual_seed(0)
    model = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**SIZES, num_hidden_layers=3))
    for layers, message in (
        ([3], r"expected layers in \[-3, 3\), got 3"),
        ([0, -3], r"expected each layer once, got \[0, -3\]"),
        ([0, 1, 2], "expected an attention block to remain, got all 3 layers"),
    ):
        with pytest.raises(ValueError, match=message):
            replace_attention(model, layers)
    biased = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**SIZES, num_hidden_layers=2))
    with pytest.raises(ValueError, match=r"layer 1: expected projections without bias, .*, got a bias in q_proj"):
        replace_attention(biased, [1])
    before = model.model.layers[0].self_attn
    block = model.model.layers[1].self_attn
    block.k_norm = OtherNorm(16)
    with pytest.raises(TypeError, match="layer 1: expected q_norm and k_norm to be RMSNorms, got OtherNorm"):
        replace_attention(model, [0, 1])
    assert model.model.layers[0].self_attn is before  # all or none
    block.o_proj = nn.Identity()
    with pytest.raises(TypeError, match=r"layer 1: expected o_proj to be an nn\.Linear .*, got Identity in Qwen3A"):
        replace_attention(model, [1])
    model.model.layers[2].self_attn.v_proj = nn.Linear(32, 48, bias=False)
    with pytest.raises(
        ValueError, match=r"expected v_proj.weight of shape \[32, 32\] at head_dim = 16, got \[48, 32\]"
    ):
        replace_attention(model, [2])
    model.model.layers[0] = nn.Linear(1, 1)
    with pytest.raises(TypeError, match="expected layer 0 to have an attention block self_attn, got Linear"):
        replace_attention(model, [0])
    with pytest.raises(TypeError, match="expected a model with a list of decoder layers, got BertModel"):
        replace_attention(transformers.BertModel(transformers.BertConfig(num_hidden_layers=1, hidden_size=12)), [0])
