"""Weights that are published in block-scaled FP8: dequantized as transformers does, and exported in 16 bits."""

import json

import torch
from safetensors.torch import load_file, save_file
from transformers.integrations.finegrained_fp8 import Fp8Dequantize

from helpers.exports import assert_dequantized
from helpers.tiny_models import tiny_hf_model
from lit_gpt.quantization import fp8

CONVERT = "scripts/convert_hf_checkpoint.py"
BLOCK = (32, 48)
LACKING = "model.layers.0.self_attn.q_proj.weight"


def quantized(weight: torch.Tensor, block: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the codes of a weight and the factors of its blocks, the last ones cut off."""
    grid = [-(-size // step) for size, step in zip(weight.shape, block, strict=True)]
    scales = torch.rand(grid) * 0.01 + 0.001
    codes = torch.empty_like(weight, dtype=torch.float8_e4m3fn)
    for i in range(grid[0]):
        for j in range(grid[1]):
            part = slice(i * block[0], (i + 1) * block[0]), slice(j * block[1], (j + 1) * block[1])
            codes[part] = (weight[part] / scales[i, j]).clamp(-448, 448).to(torch.float8_e4m3fn)
    return codes, scales


def test_dequantized_numbers_are_those_of_transformers():
    torch.manual_seed(0)
    codes, scales = quantized(torch.randn(256, 384), (128, 128))
    expected = Fp8Dequantize(None)._dequantize_one(codes, scales, torch.bfloat16)
    assert torch.equal(fp8.dequantize(codes, scales, (128, 128)), expected) and len(expected.unique()) > 500
    assert torch.equal(fp8.dequantize(codes, torch.tensor(0.5), (128, 128)), (codes.float() / 2).bfloat16())


def test_blocks_that_are_cut_off():
    """Against each block by itself, in float64."""
    torch.manual_seed(0)
    codes, scales = quantized(torch.randn(75, 100), BLOCK)
    found = fp8.dequantize(codes, scales, BLOCK)
    for row, column in ((0, 0), (31, 47), (32, 48), (74, 99)):
        exact = codes[row, column].double() * scales[row // 32, column // 48].double()
        assert found[row, column] == exact.float().bfloat16()


def test_a_checkpoint_in_8_bits(cli, tmp_path):
    """As Qwen 3 and DeepSeek V3 are published: projections in 8 bits, with a factor for each block."""
    torch.manual_seed(0)
    model = tiny_hf_model("qwen_moe", "qwen3_moe").bfloat16()
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    expected = dict(tensors)
    for name in [name for name in tensors if name.endswith("_proj.weight")]:
        tensors[name], tensors[name + "_scale_inv"] = quantized(tensors[name].float(), BLOCK)
        expected[name] = fp8.dequantize(tensors[name], tensors[name + "_scale_inv"], BLOCK)
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    config = json.loads((tmp_path / "config.json").read_text())
    settings = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": list(BLOCK)}
    (tmp_path / "config.json").write_text(json.dumps(config | {"quantization_config": settings}))

    assert_dequantized(tmp_path, expected)

    for size in ([128, 16], [16, 24]):
        wrong = config | {"quantization_config": settings | {"weight_block_size": size}}
        (tmp_path / "config.json").write_text(json.dumps(wrong))
        cli(CONVERT, checkpoint_dir=tmp_path).refused("q_proj.weight", "weight_block_size")
    (tmp_path / "config.json").write_text(json.dumps(config | {"quantization_config": settings}))
    lacking = {name: tensor for name, tensor in tensors.items() if name != LACKING + "_scale_inv"}
    save_file(lacking, tmp_path / "model.safetensors", {"format": "pt"})
    cli(CONVERT, checkpoint_dir=tmp_path).refused(
        f"{LACKING}: is one part of a quantized tensor", f"holds {LACKING}_scale_inv"
    )


def test_shards_that_are_missing_or_cut_off(cli, tmp_path):
    """Of a model in 8 bits whose factors lie in another shard than its codes: one line, which names the file."""
    model = tiny_hf_model("qwen_moe", "qwen3_moe").bfloat16()
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    tensors[LACKING], scales = quantized(tensors[LACKING].float(), BLOCK)
    shards = {"a.safetensors": tensors, "b.safetensors": {LACKING + "_scale_inv": scales}}
    for file, part in shards.items():
        save_file(part, tmp_path / file, {"format": "pt"})
    weight_map = {name: file for file, part in shards.items() for name in part}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    contents = (tmp_path / "b.safetensors").read_bytes()
    for size in (len(contents) - 1, 8, 0):
        (tmp_path / "b.safetensors").write_bytes(contents[:size])
        cli(CONVERT, checkpoint_dir=tmp_path).refused(
            "b.safetensors: not a readable safetensors file", "download it again"
        )
    (tmp_path / "b.safetensors").unlink()
    cli(CONVERT, checkpoint_dir=tmp_path).refused("b.safetensors: named by model.safetensors.index.json but missing")
    assert not (tmp_path / "lit_model.pth").exists()
