"""What the trained models are worth: held-out bits per byte, the operator's error, and decoding."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from examples.stdlib_lm.model import ByteLM
from examples.stdlib_lm.presets import Preset
from examples.stdlib_lm.train import autocast
from gka_ops import chunk_gka, chunk_solve
from gka_ops.nn import LayerOperands
from gka_ops.reference import exact


@torch.no_grad()
def bits_per_byte(model: ByteLM, inputs: Tensor, targets: Tensor, preset: Preset) -> Tensor:
    """Mean code length of a byte in each window of ``targets`` [windows, T], in bits, fp64 [windows] on the CPU.

    Every window starts with an empty memory.
    """
    lengths = []
    for start in range(0, inputs.shape[0], preset.batch_size):
        some = slice(start, start + preset.batch_size)
        with autocast(preset, inputs.device):
            logits = model(inputs[some])
        nats = F.cross_entropy(logits.mT.float(), targets[some], reduction="none")
        lengths.append(nats.double().mean(1).cpu() / math.log(2))
    return torch.cat(lengths)


@dataclass(frozen=True)
class OperatorError:
    """Relative error ‖Δ‖/‖exact‖ over the tokens and heads of one layer.

    Attributes:
        layer: index of the layer.
        tensor: ``"x"``, the solution of the ridge system, or ``"output"``.
        p50: median.
        p99: 99th percentile.
        max: largest.
    """

    layer: int
    tensor: str
    p50: float
    p99: float
    max: float


@torch.no_grad()
def layer_operands(model: ByteLM, tokens: Tensor, preset: Preset) -> list[LayerOperands]:
    """What every GKA layer hands to the operator when the model reads ``tokens`` [B, T]."""
    captured: list[LayerOperands] = []

    def capture(layer: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        captured.append(layer.operands(arguments[0]))  # type: ignore[operator]  # only put on GatedKalmaNet

    handles = [mixer.register_forward_pre_hook(capture) for mixer in model.mixers]
    try:
        with autocast(preset, tokens.device):
            model(tokens)
    finally:
        for handle in handles:
            handle.remove()
    return captured


@torch.no_grad()
def operator_errors(model: ByteLM, tokens: Tensor, preset: Preset) -> list[OperatorError]:
    """Compares the operators with the fp64, token-by-token definition on what ``tokens`` [B, T] make of the model.

    Both get the same, already rounded operands, so that the error is the operator's own.
    """
    rows = []
    for index, (mixer, operands) in enumerate(zip(model.mixers, layer_operands(model, tokens, preset), strict=True)):
        q, k, v, log_decay, alpha, beta, ridge = operands
        num_iter, tol, gate = mixer.num_iter, mixer.tol, mixer.gate
        x, _ = chunk_solve(q, k, log_decay, beta, ridge=ridge, num_iter=num_iter, tol=tol, gate=gate, qk_l2norm=True)
        output, _ = chunk_gka(
            q, k, v, log_decay, alpha, beta, ridge=ridge, num_iter=num_iter, tol=tol, gate=gate, qk_l2norm=True
        )
        exact_x, _ = exact.chunk_solve(q, k, log_decay, beta, ridge=(ridge, 0.0), gate=gate, qk_l2norm=True)
        exact_output, _ = exact.chunk_gka(
            q, k, v, log_decay, alpha, beta, ridge=(ridge, 0.0), gate=gate, qk_l2norm=True
        )
        for name, measured, true in (("x", x, exact_x), ("output", output, exact_output)):
            rows.append(OperatorError(index, name, *_relative_errors(measured, true)))
    return rows


def _relative_errors(measured: Tensor, true: Tensor) -> tuple[float, float, float]:
    """(p50, p99, max) of ‖measured − true‖/‖true‖ over the last dimension, in fp64."""
    true = true.double()
    error = (measured.double() - true).norm(dim=-1) / true.norm(dim=-1)
    p50, p99, largest = torch.quantile(error.flatten(), error.new_tensor([0.5, 0.99, 1.0])).tolist()
    return p50, p99, largest


@dataclass(frozen=True)
class Decoding:
    """Greedy decoding against one chunked pass over the same text, in fp32.

    Attributes:
        prompt: what was continued.
        text: the continuation.
        tokens: its length in bytes.
        matching: how many of its bytes are those of the chunked pass.
        largest_logit_difference: over all steps and bytes, between the two ways to compute.
        smallest_margin: smallest distance of the two best logits at any step.
        largest_mismatch_margin: the same, largest over the steps that differ; 0 if none does.
        tokens_per_second: of the decoding alone, without its first step.
    """

    prompt: str
    text: str
    tokens: int
    matching: int
    largest_logit_difference: float
    smallest_margin: float
    largest_mismatch_margin: float
    tokens_per_second: float


@torch.no_grad()
def decode(model: ByteLM, prompt: Tensor, count: int) -> Decoding:
    """Continues ``prompt`` [1, P] by ``count`` > 2 bytes, the likeliest each: ``chunk_gka``, then ``recurrent_gka``.

    The check is one chunked pass over prompt and continuation from nothing. The model is causal, so row t of it is what
    a recomputation of the first t bytes would give; its likeliest byte must be the one that decoding took.
    """
    caches = model.init_caches(1)
    logits = model(prompt, caches)[:, -1]
    steps, generated = [logits], [logits.argmax(-1, keepdim=True)]
    start = time.perf_counter()
    for step in range(1, count):
        if step == 2:  # the first step may compile
            start = time.perf_counter()
        logits = model(generated[-1], caches)[:, -1]
        steps.append(logits)
        generated.append(logits.argmax(-1, keepdim=True))
    continuation = torch.cat(generated, dim=1)
    text = bytes(continuation[0].tolist())  # waits for the device
    seconds = time.perf_counter() - start

    whole = model(torch.cat((prompt, continuation[:, :-1]), dim=1))[0, prompt.shape[1] - 1 :]  # [count, 256]
    differs = whole.argmax(-1) != continuation[0]
    best, second = whole.topk(2, dim=-1).values.unbind(-1)
    margin = best - second
    return Decoding(
        prompt=bytes(prompt[0].tolist()).decode("utf-8", "replace"),
        text=text.decode("utf-8", "replace"),
        tokens=count,
        matching=count - int(differs.sum()),
        largest_logit_difference=float((torch.cat(steps) - whole).abs().max()),
        smallest_margin=float(margin.min()),
        largest_mismatch_margin=float(torch.where(differs, margin, 0.0).max()),
        tokens_per_second=(count - 2) / seconds,
    )
