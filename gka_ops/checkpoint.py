"""Weights of a GKA layer from a published checkpoint: ``gka-convert CHECKPOINT --layer 3 --output OUTPUT``.

A checkpoint is a safetensors file, a ``*.safetensors.index.json`` beside the shards it names, or a folder with either.
Names and shapes come from the files' headers; of the data only the tensors of the layer are read. Needs
``safetensors``.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gka_ops.nn import GatedKalmaNet

GATES = ("A_log", "dt_bias")
"""Parameters that are fp32 whatever the dtype of the others."""


class LayerWeights(NamedTuple):
    """One layer of a checkpoint.

    Attributes:
        prefix: what precedes the layer's parameters in the checkpoint, for instance ``"model.layers.3.self_attn."``.
        options: arguments of :class:`gka_ops.GatedKalmaNet` that the shapes determine.
        state_dict: the layer's parameters found, in the checkpoint's dtype, ``A_log`` and ``dt_bias`` in at least fp32.
        missing: parameters of the layer that the checkpoint lacks.
        unused: full names of the tensors of the same decoder layer that were not used (its norms, its MLP, and whatever
            else the GKA layer stored).
        elsewhere: how many tensors the checkpoint holds outside that decoder layer.
    """

    prefix: str
    options: dict[str, Any]
    state_dict: dict[str, Tensor]
    missing: tuple[str, ...]
    unused: tuple[str, ...]
    elsewhere: int

    def build(self, device: torch.device | str | None = None, **options: Any) -> GatedKalmaNet:
        """The layer with these weights, in their dtype.

        Args:
            device: where to put it; ``None`` means the CPU.
            **options: further arguments of :class:`gka_ops.GatedKalmaNet`, for instance ``num_iter=30``.

        Raises:
            ValueError: parameters are missing.
        """
        if self.missing:
            raise ValueError(
                f"LayerWeights: expected all parameters of {self.prefix}*, got none of {_names(self.missing)}"
            )
        layer = GatedKalmaNet(**self.options, **options, device="meta")
        layer.load_state_dict(self.state_dict, assign=True)
        return layer.to(device or "cpu")


def read_layer(checkpoint: str | Path, layer: int, prefix: str | None = None) -> LayerWeights:
    """Reads the GKA layer of decoder layer ``layer``.

    Args:
        checkpoint: the file, index or folder. Of the shards that an index names, only those with the layer are opened.
        layer: the decoder layer's index, as in ``model.layers.3``.
        prefix: what precedes the parameters, up to and with the last dot; ``None`` finds the one with an ``A_log``.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a file is malformed; the decoder layer has no GKA layer, or more than one; the checkpoint lacks what
            the sizes are read from; or a shape does not fit the others.
    """
    home = _locate(Path(checkpoint))
    prefix = _find_prefix(home, layer) if prefix is None else prefix
    with ExitStack() as stack:
        files = {path: stack.enter_context(_open(path)) for name, path in home.items() if name.startswith(prefix)}
        stored = {name.removeprefix(prefix): files[home[name]] for name in home if name.startswith(prefix)}
        shapes = {name: tuple(file.get_slice(prefix + name).get_shape()) for name, file in stored.items()}
        options = _sizes(shapes, prefix)
        expected = {name: tuple(p.shape) for name, p in GatedKalmaNet(**options, device="meta").state_dict().items()}
        for name, shape in expected.items():
            if name in shapes and shapes[name] != shape:
                raise ValueError(
                    f"read_layer: expected {prefix}{name} of shape {list(shape)} "
                    f"({', '.join(f'{key} = {value}' for key, value in options.items())}), got {list(shapes[name])}"
                )
        state_dict = {name: stored[name].get_tensor(prefix + name) for name in expected if name in stored}
    for name in GATES:
        if name in state_dict:
            state_dict[name] = state_dict[name].to(torch.promote_types(state_dict[name].dtype, torch.float32))
    block = re.match(rf"(.*?\b)?layers\.{layer}\.", prefix)
    own = [name for name in home if name.startswith(prefix if block is None else block[0])]
    used = {prefix + name for name in state_dict}
    return LayerWeights(
        prefix,
        options,
        state_dict,
        missing=tuple(name for name in expected if name not in stored),
        unused=tuple(sorted(name for name in own if name not in used)),
        elsewhere=len(home) - len(own),
    )


def _open(path: Path) -> Any:
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise FileNotFoundError(f"read_layer: expected the file {path}, got none")
    try:
        return safe_open(path, framework="pt")
    except SafetensorError as error:
        raise ValueError(f"read_layer: expected a safetensors file, got {path}: {error}") from error


def _locate(checkpoint: Path) -> dict[str, Path]:
    """The file of every tensor."""
    if checkpoint.is_dir():
        found = sorted(checkpoint.glob("*.safetensors.index.json")) or sorted(checkpoint.glob("*.safetensors"))
        if len(found) != 1:
            raise FileNotFoundError(
                f"read_layer: expected one *.safetensors.index.json or one *.safetensors file in {checkpoint}, got "
                f"{_names([path.name for path in found]) or 'none'}"
            )
        checkpoint = found[0]
    if not checkpoint.name.endswith(".index.json"):
        with _open(checkpoint) as file:
            return dict.fromkeys(file.keys(), checkpoint)
    index = json.loads(checkpoint.read_text())
    if not isinstance(index, dict) or not isinstance(index.get("weight_map"), dict):
        raise ValueError(f"read_layer: expected a weight_map in {checkpoint}, got none")
    return {name: checkpoint.parent / shard for name, shard in index["weight_map"].items()}


def _find_prefix(names: Iterable[str], layer: int) -> str:
    ends = [name.removesuffix("A_log") for name in names if name.endswith(".A_log")]
    found = [prefix for prefix in ends if f".layers.{layer}." in f".{prefix}"]
    if len(found) != 1:
        raise ValueError(
            f"read_layer: expected one *layers.{layer}.*.A_log in the checkpoint, got {_names(found) or 'none'}; "
            f"GKA layers found: {_names(ends) or 'none'}"
        )
    return found[0]


def _sizes(shapes: dict[str, tuple[int, ...]], prefix: str) -> dict[str, Any]:
    """The sizes of the layer from the parameters that determine them."""
    ranks = {"A_log": 1, "q_proj.weight": 2, "v_proj.weight": 2, "o_norm.weight": 1, "q_conv1d.weight": 3}
    for name, rank in ranks.items():
        shape = shapes.get(name)
        if shape is None:
            raise ValueError(f"read_layer: expected {prefix}{name}, from which sizes are read, got none")
        if len(shape) != rank or 0 in shape:
            raise ValueError(
                f"read_layer: expected {prefix}{name} with {rank} non-empty dimensions, got shape {list(shape)}"
            )
    (H,), (V,) = shapes["A_log"], shapes["o_norm.weight"]
    (queries, hidden_size), (values, _) = shapes["q_proj.weight"], shapes["v_proj.weight"]
    if queries % H != 0 or values % V != 0 or H % (values // V) != 0:
        raise ValueError(
            f"read_layer: expected q_proj and v_proj of {prefix}* to have a multiple of {H} (heads, from A_log) and of "
            f"{V} (from o_norm) rows, the latter for a divisor of the heads, got {queries} and {values}"
        )
    return {
        "hidden_size": hidden_size,
        "head_dim": queries // H,
        "num_heads": H,
        "num_kv_heads": values // V,
        "head_v_dim": V,
        "conv_size": shapes["q_conv1d.weight"][2],
    }


def _names(names: Sequence[str]) -> str:
    return ", ".join(names)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line. Exit code 1 where parameters are missing (then nothing is written), 2 where reading failed."""
    parser = argparse.ArgumentParser(prog="gka-convert", description=(__doc__ or "").split(":")[0] + ".")
    parser.add_argument("checkpoint", type=Path, help="a safetensors file, an index of shards, or a folder with either")
    parser.add_argument("--layer", type=int, required=True, help="index of the decoder layer")
    parser.add_argument("--prefix", help="what precedes the layer's parameters, if it is not found by its A_log")
    parser.add_argument("--output", type=Path, help="safetensors file to write a GatedKalmaNet state dict to")
    options = parser.parse_args(arguments)
    try:
        weights = read_layer(options.checkpoint, options.layer, options.prefix)
    except (ValueError, OSError, ModuleNotFoundError) as error:
        print(error, file=sys.stderr)
        return 2
    print(f"{weights.prefix}*: GatedKalmaNet({', '.join(f'{key}={value}' for key, value in weights.options.items())})")
    print(f"used: {_names(list(weights.state_dict))}")
    print(f"missing: {_names(weights.missing) or 'none'}")
    print(f"not used, of the same decoder layer: {_names(weights.unused) or 'none'}")
    print(f"not used, elsewhere in the checkpoint: {weights.elsewhere} tensors")
    if weights.missing:
        return 1
    if options.output is not None:
        from safetensors.torch import save_file

        save_file(weights.state_dict, options.output, metadata={k: str(v) for k, v in weights.options.items()})
    return 0


if __name__ == "__main__":
    sys.exit(main())
