"""Medians, their intervals, and what two of them say about each other."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch

from gka_ops_perf.records import Estimate

CONFIDENCE = 0.95
RESAMPLES = 4000
TOLERANCE = 0.05
"""A ratio of times within 1 ± this is no change, however sure it is."""

Verdict = Literal["same", "faster", "slower", "unclear"]


def estimate(samples: Sequence[float]) -> Estimate:
    """The median of at least one sample, with its bootstrap interval (percentiles, a fixed seed)."""
    values = torch.tensor(samples, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    drawn = values[torch.randint(len(values), (RESAMPLES, len(values)), generator=generator)]
    tail = (1 - CONFIDENCE) / 2
    low, high = torch.quantile(drawn.quantile(0.5, dim=-1), torch.tensor([tail, 1 - tail], dtype=torch.float64))
    return Estimate(float(values.quantile(0.5)), float(low), float(high), len(samples))


def ratio(base: Sequence[float], head: Sequence[float]) -> Estimate:
    """head over base. Samples were taken in turns, so that the i-th of both saw the same state of the machine.

    The estimate is the median of the ratios of pairs: what slows both of a pair down cancels.
    """
    if len(base) != len(head):
        raise ValueError(f"expected as many samples of both, got {len(base)} and {len(head)}")
    return estimate([after / before for before, after in zip(base, head, strict=True)])


def verdict(ratio: Estimate, tolerance: float = TOLERANCE) -> Verdict:
    """Of a ratio of times: a change is one beyond ``tolerance`` whose interval excludes 1."""
    if ratio.median > 1 + tolerance:
        return "slower" if ratio.low > 1 else "unclear"
    if ratio.median < 1 - tolerance:
        return "faster" if ratio.high < 1 else "unclear"
    return "same"


def spread(samples: Sequence[float]) -> float:
    """How far samples lie apart: the middle half of them over their median."""
    values = torch.tensor(samples, dtype=torch.float64)
    low, middle, high = values.quantile(torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)).tolist()
    return float((high - low) / middle) if middle > 0 else math.inf
