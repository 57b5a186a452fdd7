"""Models of ``gka_ops.hf`` on a card: generation through a compiled step, and 100,000 decoded tokens."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

pytest.importorskip("transformers", reason="needs transformers: pip install gka-ops[transformers]")

import transformers

from gka_ops.hf import GKAAttention, GKACache, GKAConfig, GKAForCausalLM
from gka_ops.hf.model import CACHE_ARGUMENT
from tests.helpers import graphs
from tests.helpers.problems import norm_error

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("no_gradients")]

GKA, ATTENTION = "linear_attention", "full_attention"
VOCABULARY, PROMPT = 512, 100


@pytest.fixture
def no_gradients() -> Iterator[None]:
    transformers.logging.disable_progress_bar()
    with torch.no_grad():
        yield


def make_model(layer_types: list[str], dtype: torch.dtype) -> GKAForCausalLM:
    torch.manual_seed(0)
    config = GKAConfig(
        vocab_size=VOCABULARY, hidden_size=256, intermediate_size=512, num_attention_heads=4, num_key_value_heads=2,
        head_dim=64, num_hidden_layers=len(layer_types), layer_types=layer_types, initializer_range=0.1,
        pad_token_id=0, bos_token_id=1, eos_token_id=None,
    )  # fmt: skip
    model = GKAForCausalLM(config).eval().to("cuda", dtype)
    for module in model.modules():
        if isinstance(module, GKAAttention) and module.A_log is not None:
            module.A_log.uniform_(-3, 0)
    return model


def make_tokens(*shape: int) -> Tensor:
    return torch.randint(2, VOCABULARY, shape, generator=torch.Generator().manual_seed(1)).cuda()


@pytest.mark.parametrize("options", [{}, {"cache_implementation": "static"}], ids=["eager", "static"])
@pytest.mark.parametrize("layer_types", [[GKA, GKA], [GKA, ATTENTION]], ids=["pure", "hybrid"])
def test_generation_agrees_with_recomputation(layer_types: list[str], options: dict[str, Any]) -> None:
    """Greedy tokens in fp32. With a static cache ``generate`` compiles the step, with CUDA graphs.

    A token may be another than the most likely one only where both are equally likely but for rounding.
    """
    model, prompt = make_model(layer_types, torch.float32), make_tokens(2, PROMPT)
    said = model.generate(prompt, max_new_tokens=40, do_sample=False, **options)
    assert said.shape == (2, PROMPT + 40)
    assert said[:, PROMPT:].unique().numel() > 4, "not one token for ever"
    logits = model(said, use_cache=False).logits[:, PROMPT - 1 : -1].float()
    best = logits.max(-1).values
    chosen = logits.gather(-1, said[:, PROMPT:, None])[..., 0]
    assert float((best - chosen).max()) < 2e-3 * float(logits.std())


def test_memory_over_100_000_decoded_tokens() -> None:
    """Constant, and the state at the end is that of a prefill of all these tokens."""
    count, every = 100_000, 10_000
    model = make_model([GKA, GKA], torch.bfloat16)
    cache, prompt = GKACache(model.config), make_tokens(1, PROMPT)
    token = torch.zeros(1, 1, dtype=torch.int64, device="cuda")
    said = torch.zeros(count, dtype=torch.int64, device="cuda")
    position = torch.zeros(1, dtype=torch.int64, device="cuda")
    noise = torch.zeros(VOCABULARY, device="cuda")

    def step() -> None:
        logits = model(token, **{CACHE_ARGUMENT: cache}).logits[0, -1].float()
        token.copy_((logits + noise.exponential_().log().neg()).argmax().view(1, 1))  # a sample: Gumbel's maximum
        said.index_copy_(0, position, token.view(1))
        position.add_(1)

    model(prompt, **{CACHE_ARGUMENT: cache})
    token.copy_(prompt[:, -1:])
    states = [layer.buffers() for layer in cache.layers]
    before = [leaf.clone() for leaf in pytree.tree_leaves(states)]
    seen = [layer.cumulative_length.clone() for layer in cache.layers]
    graph, _ = graphs.captured(step)  # which called it once
    for leaf, value in zip(pytree.tree_leaves(states), before, strict=True):
        leaf.copy_(value)
    for layer, value in zip(cache.layers, seen, strict=True):
        layer.cumulative_length.copy_(value)
    token.copy_(prompt[:, -1:])
    position.zero_()

    memory = set()
    for _ in range(count // every):
        for _ in range(every):
            graph.replay()
        torch.cuda.synchronize()
        memory.add((torch.cuda.memory_allocated(), torch.cuda.memory_reserved()))
    assert len(memory) == 1
    assert int(position) == count and int(cache.get_seq_length()) == PROMPT + count
    assert said.unique().numel() > VOCABULARY // 2

    whole = torch.cat((prompt[0], prompt[0, -1:], said[:-1]))[None]
    expected = GKACache(model.config)
    for part in whole.split(16384, dim=1):
        model(part, logits_to_keep=1, **{CACHE_ARGUMENT: expected})
    for layer, reference in zip(cache.layers, expected.layers, strict=True):
        for buffer, value in zip(
            pytree.tree_leaves(layer.buffers()), pytree.tree_leaves(reference.buffers()), strict=True
        ):
            assert norm_error(buffer, value) < 3e-2
