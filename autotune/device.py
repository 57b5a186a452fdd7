"""The card, as far as a configuration depends on it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache

import torch


@dataclass(frozen=True)
class Device:
    """What a table is for.

    Attributes:
        name: as the driver gives it: an H100 and an H200 differ in nothing else that is listed here.
        capability: compute capability.
        multiprocessors: their number.
        shared_memory: bytes that one program may have.
    """

    name: str
    capability: tuple[int, int]
    multiprocessors: int
    shared_memory: int

    @property
    def is_hopper(self) -> bool:
        """Whether it runs the Gluon kernels."""
        return self.capability == (9, 0)

    @property
    def slug(self) -> str:
        """The name, fit for a file's."""
        return re.sub(r"[^a-z0-9]+", "-", self.name.lower()).strip("-")[:80] or "unnamed"


@cache
def current(index: int) -> Device:
    """The CUDA card of this ordinal."""
    properties = torch.cuda.get_device_properties(index)
    return Device(
        name=properties.name,
        capability=(properties.major, properties.minor),
        multiprocessors=properties.multi_processor_count,
        shared_memory=getattr(properties, "shared_memory_per_block_optin", properties.shared_memory_per_block),
    )
