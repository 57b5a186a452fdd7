"""Runs functions in several processes that form a group."""

from __future__ import annotations

import socket
import traceback
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def _main(rank: int, world: int, port: int, backend: str, functions: list[Callable[..., None]], queue: Any) -> None:
    torch.set_num_threads(1)
    if backend == "nccl":
        torch.cuda.set_device(rank)
    dist.init_process_group(backend, init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)
    try:
        for function in functions:
            try:
                function()
                message = None
            except Exception:
                message = traceback.format_exc()
            results: list[Any] = [None] * world
            dist.all_gather_object(results, message)
            if rank == 0:
                queue.put(next((m for m in results if m is not None), None))
    finally:
        dist.destroy_process_group()


def run_together(world: int, functions: list[Callable[..., None]], backend: str = "gloo") -> list[str | None]:
    """Runs ``functions`` one after the other in each of ``world`` processes; returns what went wrong in each, if any.

    With ``backend="nccl"`` every process has a card of its own.

    Functions must be importable: they are pickled. One that raises must raise on every rank, or before it communicates.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = mp.get_context("spawn")
    queue = context.SimpleQueue()
    mp.spawn(_main, (world, port, backend, functions, queue), nprocs=world)
    return [queue.get() for _ in functions]
