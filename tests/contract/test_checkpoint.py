"""``gka_ops.checkpoint``: a GKA layer out of safetensors files with the published names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("safetensors", reason="needs safetensors: pip install gka-ops[transformers]")

import safetensors
from safetensors.torch import load_file, save_file

from gka_ops.checkpoint import main, read_layer
from gka_ops.nn import GatedKalmaNet

HIDDEN, H, HKV, D, K = 48, 4, 2, 16, 4
OPTIONS = {"hidden_size": HIDDEN, "head_dim": D, "num_heads": H, "num_kv_heads": HKV, "head_v_dim": D, "conv_size": K}
GKA = "model.layers.3.self_attn."


def published_layer(dtype: torch.dtype = torch.bfloat16) -> dict[str, Tensor]:
    """A layer by the published names and shapes, written out here so that our own parameter names are not trusted."""
    generator = torch.Generator().manual_seed(0)
    shapes: dict[str, tuple[int, ...]] = {
        "q_proj.weight": (H * D, HIDDEN),
        "k_proj.weight": (HKV * D, HIDDEN),
        "v_proj.weight": (HKV * D, HIDDEN),
        "a_proj.weight": (H, HIDDEN),
        "b_proj.weight": (H, HIDDEN),
        "b_proj.bias": (H,),
        "alpha_proj.weight": (H, HIDDEN),
        "alpha_proj.bias": (H,),
        "q_conv1d.weight": (H * D, 1, K),
        "k_conv1d.weight": (HKV * D, 1, K),
        "v_conv1d.weight": (HKV * D, 1, K),
        "g_proj.weight": (H * D, HIDDEN),
        "o_norm.weight": (D,),
        "o_proj.weight": (HIDDEN, H * D),
    }
    tensors = {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}
    return tensors | {name: torch.randn(H, generator=generator) for name in ("A_log", "dt_bias")}


def checkpoint(**changed: Tensor | None) -> dict[str, Tensor]:
    """Five decoder layers, of which 3 and 13 are GKA; ``changed`` replaces tensors of layer 3, or removes them."""
    tensors = {"model.embed_tokens.weight": torch.zeros(7, HIDDEN), "lm_head.weight": torch.zeros(7, HIDDEN)}
    for index in (0, 3, 13):
        block = f"model.layers.{index}."
        tensors |= {
            block + "mlp.up_proj.weight": torch.zeros(8, HIDDEN),
            block + "input_layernorm.weight": torch.ones(HIDDEN),
        }
        if index == 0:
            tensors |= {block + "self_attn.q_proj.weight": torch.zeros(H * D, HIDDEN)}
        if index == 13:
            tensors |= {f"{block}self_attn.{name}": tensor + 1 for name, tensor in published_layer().items()}
    layer = published_layer() | {
        name.replace("__", "."): tensor for name, tensor in changed.items() if tensor is not None
    }
    removed = {name.replace("__", ".") for name, tensor in changed.items() if tensor is None}
    return tensors | {GKA + name: tensor for name, tensor in layer.items() if name not in removed}


def single(folder: Path, **changed: Tensor | None) -> Path:
    save_file(checkpoint(**changed), folder / "model.safetensors")
    return folder / "model.safetensors"


def test_reads_the_layer_and_says_what_it_did_not_use(tmp_path: Path) -> None:
    weights = read_layer(single(tmp_path, rotary__inv_freq=torch.ones(8)), 3)
    assert weights.prefix == GKA
    assert weights.options == OPTIONS
    assert weights.missing == ()
    assert weights.unused == (
        "model.layers.3.input_layernorm.weight",
        "model.layers.3.mlp.up_proj.weight",
        "model.layers.3.self_attn.rotary.inv_freq",
    )
    assert weights.elsewhere == 2 + 3 + 2 + len(published_layer())
    expected = published_layer()
    assert weights.state_dict.keys() == expected.keys()
    assert all(torch.equal(weights.state_dict[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_built_layer_computes_with_the_weights(tmp_path: Path, dtype: torch.dtype) -> None:
    layer = read_layer(single(tmp_path), 3).build(num_iter=30)
    layer = layer.float() if dtype == torch.float32 else layer  # .to(bf16) would round the gates, too
    expected = GatedKalmaNet(HIDDEN, D, H, HKV, num_iter=30, dtype=dtype)
    expected.load_state_dict(published_layer())
    x = torch.randn(2, 20, HIDDEN, dtype=dtype, generator=torch.Generator().manual_seed(1))
    assert torch.equal(layer(x), expected(x))
    assert layer.num_iter == 30


def test_gates_become_fp32(tmp_path: Path) -> None:
    path = single(tmp_path, A_log=torch.randn(H).bfloat16(), dt_bias=torch.randn(H).bfloat16())
    weights = read_layer(path, 3)
    assert weights.state_dict["A_log"].dtype == weights.state_dict["dt_bias"].dtype == torch.float32
    assert weights.build().q_proj.weight.dtype == torch.bfloat16


def shards(folder: Path) -> Path:
    """Three shards and their index; the layer spans two of them, the third does not exist."""
    tensors = checkpoint()
    own = [name for name in tensors if name.startswith(GKA)]
    weight_map = {name: "c.safetensors" for name in tensors} | {
        name: f"{'ab'[i % 2]}.safetensors" for i, name in enumerate(own)
    }
    for shard in ("a.safetensors", "b.safetensors"):
        save_file({name: tensors[name] for name in own if weight_map[name] == shard}, folder / shard)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return index


@pytest.mark.parametrize("by_folder", [False, True])
def test_reads_shards_and_opens_only_those_with_the_layer(tmp_path: Path, by_folder: bool) -> None:
    index = shards(tmp_path)
    weights = read_layer(tmp_path if by_folder else index, 3)
    expected = published_layer()
    assert all(torch.equal(weights.state_dict[name], tensor) for name, tensor in expected.items())
    assert weights.elsewhere == len(checkpoint()) - len(expected) - 2
    with pytest.raises(FileNotFoundError, match=r"expected the file .*c\.safetensors"):
        read_layer(index, 13)


def test_reads_no_data_but_the_layers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, read = single(tmp_path, rotary__inv_freq=torch.ones(8)), []

    class Recording:
        def __init__(self, *arguments: Any, **options: Any) -> None:
            self.file = safetensors.safe_open(*arguments, **options)

        def __enter__(self) -> Recording:
            self.file.__enter__()
            return self

        def __exit__(self, *arguments: Any) -> None:
            self.file.__exit__(*arguments)

        def get_tensor(self, name: str) -> Tensor:
            read.append(name)
            return self.file.get_tensor(name)

        def __getattr__(self, name: str) -> Any:
            return getattr(self.file, name)

    original = safetensors.safe_open
    monkeypatch.setattr("safetensors.safe_open", Recording)
    monkeypatch.setattr(Recording, "__init__", lambda self, *a, **o: setattr(self, "file", original(*a, **o)))
    read_layer(path, 3)
    assert sorted(read) == sorted(GKA + name for name in published_layer())


def test_another_prefix_and_missing_parameters(tmp_path: Path) -> None:
    tensors = {f"mixer.{name}": tensor for name, tensor in published_layer().items()}
    del tensors["mixer.alpha_proj.bias"], tensors["mixer.o_proj.weight"]
    save_file(tensors | {"other.weight": torch.zeros(1)}, tmp_path / "layer.safetensors")
    weights = read_layer(tmp_path, 0, prefix="mixer.")
    assert set(weights.missing) == {"alpha_proj.bias", "o_proj.weight"}
    assert (weights.unused, weights.elsewhere) == ((), 1)
    with pytest.raises(
        ValueError, match=r"expected all parameters of mixer\.\*, got none of alpha_proj.bias, o_proj.weight"
    ):
        weights.build()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            {"k_conv1d__weight": torch.zeros(HKV * D, 1, 3)},
            r"k_conv1d.weight of shape \[32, 1, 4\] .*, got \[32, 1, 3\]",
        ),
        (
            {"k_proj__weight": torch.zeros(H * D, HIDDEN)},
            r"k_proj.weight of shape \[32, 48\] \(hidden_size = 48, .*\[64, 48\]",
        ),
        ({"dt_bias": torch.zeros(3)}, r"dt_bias of shape \[4\] .*num_heads = 4.*, got \[3\]"),
        ({"o_norm__weight": torch.zeros(D, 1)}, r"o_norm.weight with 1 non-empty dimensions, got shape \[16, 1\]"),
        ({"o_norm__weight": torch.zeros(7)}, r"multiple of 4 .* and of 7 .* rows.*, got 64 and 32"),
        ({"A_log": torch.zeros(3)}, r"multiple of 3 \(heads, from A_log\)"),
        (
            {"q_proj__weight": None},
            r"expected model.layers.3.self_attn.q_proj.weight, from which sizes are read, got none",
        ),
        (
            {"A_log": None},
            r"expected one \*layers.3.\*.A_log .*, got none; GKA layers found: model.layers.13.self_attn",
        ),
        ({"gka__A_log": torch.zeros(H)}, r"got model\.layers\.3\.self_attn\.(gka\.)?, model\.layers\.3\.self_attn\."),
    ],
)
def test_says_what_it_expected(tmp_path: Path, changed: dict[str, Tensor | None], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_layer(single(tmp_path, **changed), 3)


def test_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"expected one .*, got none"):
        read_layer(tmp_path, 3)
    with pytest.raises(FileNotFoundError, match=r"expected the file .*absent\.safetensors, got none"):
        read_layer(tmp_path / "absent.safetensors", 3)
    (tmp_path / "model.safetensors").write_bytes(b"no header")
    with pytest.raises(ValueError, match=r"expected a safetensors file, got .*model\.safetensors"):
        read_layer(tmp_path, 3)
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(ValueError, match="expected a weight_map in"):
        read_layer(tmp_path, 3)


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "layer.safetensors"
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    assert main([str(shards(folder)), "--layer", "3", "--output", str(output)]) == 0
    printed = capsys.readouterr().out
    assert (
        "GatedKalmaNet(hidden_size=48, head_dim=16, num_heads=4, num_kv_heads=2, head_v_dim=16, conv_size=4)" in printed
    )
    assert "missing: none" in printed
    assert (
        "not used, of the same decoder layer: model.layers.3.input_layernorm.weight, model.layers.3.mlp.up_proj"
        in printed
    )
    layer = GatedKalmaNet(**OPTIONS, dtype=torch.bfloat16)
    layer.load_state_dict(load_file(output))
    assert torch.equal(layer.g_proj.weight, published_layer()["g_proj.weight"])
    output.unlink()
    assert main([str(single(tmp_path, o_proj__weight=None)), "--layer", "3", "--output", str(output)]) == 1
    assert "missing: o_proj.weight" in capsys.readouterr().out
    assert not output.exists()
    assert main([str(folder), "--layer", "5"]) == 2
    assert "expected one *layers.5.*.A_log" in capsys.readouterr().err
