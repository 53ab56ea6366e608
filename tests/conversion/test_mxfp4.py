"""Experts that are published in 4 bits: dequantized as transformers does, and exported in 16 bits."""

import json

import torch
from safetensors.torch import load_file, save_file
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from helpers.exports import assert_dequantized
from helpers.tiny_models import tiny_hf_model
from lit_gpt.quantization import mxfp4

CONVERT = "scripts/convert_hf_checkpoint.py"


def test_dequantized_numbers_are_those_of_transformers():
    """All 16 values, and powers of two from the smallest to the largest that bfloat16 holds with them."""
    torch.manual_seed(0)
    blocks = torch.randint(256, (3, 8, 4, 16), dtype=torch.uint8)
    scales = torch.randint(1, 250, (3, 8, 4), dtype=torch.uint8)
    found = mxfp4.dequantize(blocks, scales)
    assert torch.equal(found.mT, convert_moe_packed_tensors(blocks, scales)) and len(found.abs().unique()) > 300


def test_a_checkpoint_in_4_bits(cli, tmp_path):
    """As gpt-oss is published: experts in 4 bits, all else in bfloat16, and config.json names the quantization."""
    model = tiny_hf_model("gpt_oss", "gpt_oss").bfloat16()
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    expected = dict(tensors)
    for name in [name for name in tensors if name.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
        experts, columns, rows = tensors.pop(name).shape
        blocks = torch.randint(256, (experts, rows, columns // 32, 16), dtype=torch.uint8)
        scales = torch.randint(122, 127, (experts, rows, columns // 32), dtype=torch.uint8)
        tensors |= {name + "_blocks": blocks, name + "_scales": scales}
        expected[name] = convert_moe_packed_tensors(blocks, scales)
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "mxfp4"}}))

    assert_dequantized(tmp_path, expected)

    name = "model.layers.1.mlp.experts.down_proj"
    for part, other in (("_scales", "_blocks"), ("_blocks", "_scales")):
        lacking = {key: tensor for key, tensor in tensors.items() if key != name + part}
        save_file(lacking, tmp_path / "model.safetensors", {"format": "pt"})
        cli(CONVERT, checkpoint_dir=tmp_path).refused(
            f"{name}{other}: is one part of a quantized", f"holds {name}{part}"
        )
    for shape in ((1,), (3, 2, 1)):
        cut = tensors | {name + "_scales": torch.ones(shape, dtype=torch.uint8)}
        save_file(cut, tmp_path / "model.safetensors", {"format": "pt"})
        cli(CONVERT, checkpoint_dir=tmp_path).refused(f"{name}: ", f"has no factors {shape}")
