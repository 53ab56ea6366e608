"""LitGPT's folders, with queries, keys and values one after another or group by group, and its LoRA weights."""

import shutil
from pathlib import Path

import pytest
import torch
import yaml

from helpers.compare import identical, tokens
from helpers.tiny_models import make_base
from lit_gpt.checkpoints import io
from lit_gpt.checkpoints.base_model import load_model
from lit_gpt.methods import lora
from lit_gpt.methods.finetuned_model import load_finetuned
from lit_gpt.model.config import Config

SCRIPT = "scripts/convert_litgpt_checkpoint.py"
RENAMED = {"wte.": "transformer.wte.", "h.": "transformer.h.", "ln_f.": "transformer.ln_f."}
SETTINGS = dict(lora_r=4, lora_alpha=8, lora_dropout=0.0, lora_key=True, lora_projection=True, lora_mlp=True,
                lora_head=True, lora_query=True, lora_value=False, learning_rate=1e-3)  # fmt: skip


def theirs(state: dict) -> dict:
    """Return a state dict as LitGPT has it, its names written out here once more."""
    found = {}
    for name, tensor in state.items():
        first = next((start for start in RENAMED if name.startswith(start)), None)
        name = RENAMED[first] + name.removeprefix(first) if first else name
        if "gate_up" in name:
            for part, half in zip(("fc_1", "fc_2"), tensor.chunk(2), strict=True):
                found[name.replace("gate_up", part)] = half.clone()
        else:
            found[name] = tensor.clone()
    return found


def grouped(tensor: torch.Tensor, config: Config) -> torch.Tensor:
    """Return queries, keys and values group by group, as old releases have them."""
    q, k, v = (part.chunk(config.n_query_groups) for part in tensor.split(config.qkv_sizes))
    return torch.cat([part for group in zip(q, k, v, strict=True) for part in group])


def litgpt_folder(base: Path, folder: Path, old: bool = False) -> Path:
    folder.mkdir()
    config, state = Config.from_checkpoint(base), theirs(io.load(base / "lit_model.pth"))
    state.setdefault("lm_head.weight", state["transformer.wte.weight"].clone())
    if old:
        fused = [name for name in state if ".attn.qkv." in name]
        state |= {name.replace(".qkv.", ".attn."): grouped(state.pop(name), config) for name in fused}
    torch.save({"model": state} if old else state, folder / "lit_model.pth")
    same = ("n_layer", "n_head", "n_embd", "head_size", "n_query_groups", "norm_eps", "rope_base", "parallel_residual")
    (folder / "model_config.yaml").write_text(yaml.dump({name: getattr(config, name) for name in same}))
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copyfile(base / name, folder / name)
    return folder


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize(
    ("family", "layout"), [("llama", "smollm2"), ("falcon", "40b"), ("gpt_neox", "pythia"), ("phi", "phi2")]
)
def test_a_folder_gives_the_same_model(cli, tmp_path, family, layout, old):
    base = make_base(tmp_path / "base", family, layout)
    result = cli(SCRIPT, litgpt_dir=litgpt_folder(base, tmp_path / "theirs", old), out_dir=tmp_path / "ours")
    assert result.code == 0, result.err
    assert identical(io.load(tmp_path / "ours" / "lit_model.pth"), io.load(base / "lit_model.pth"))
    ours, before = (load_model(folder) for folder in (tmp_path / "ours", base))
    with torch.no_grad():
        assert torch.equal(ours(tokens(before)), before(tokens(before)))


def test_lora_weights_compute_what_litgpt_computes(cli, llama, tmp_path):
    """For each layer the base's product plus alpha / r B A x, queries and keys each by their own, values by none."""
    folder, config = litgpt_folder(llama, tmp_path / "theirs"), Config.from_checkpoint(llama)
    model, shapes = load_model(llama), {}
    q, k, _ = config.qkv_sizes
    size, width = config.intermediate_size, config.n_embd
    for i in range(config.n_layer):
        at = f"transformer.h.{i}."
        shapes |= {at + "attn.qkv": (8, width, q + k), at + "attn.proj": (4, q, width)}
        shapes |= {
            at + "mlp.fc_1": (4, width, size),
            at + "mlp.fc_2": (4, width, size),
            at + "mlp.proj": (4, size, width),
        }
    shapes["lm_head"] = (4, width, config.padded_vocab_size)
    state = {}
    for name, (rank, inputs, outputs) in shapes.items():
        state |= {f"{name}.lora_A": 0.3 * torch.randn(rank, inputs), f"{name}.lora_B": 0.3 * torch.randn(outputs, 4)}
    torch.save({"model": state}, folder / "lit_model.pth.lora")
    (folder / "hyperparameters.yaml").write_text(yaml.dump(SETTINGS))
    (folder / "prompt_style.yaml").write_text("class_path: litgpt.prompts.Alpaca\n")
    flags = dict(litgpt_dir=folder, lora="true", checkpoint_dir=llama, out_dir=tmp_path / "ours")
    assert cli(SCRIPT, **flags).code == 0
    found, record = load_finetuned(llama, tmp_path / "ours" / "lit_model_lora_finetuned.pth", "lora")
    assert record["prompt_style"]["name"] == "alpaca"
    with torch.no_grad():
        for i, block in enumerate(model.h):
            at, scale = f"transformer.h.{i}.", 2.0
            A, B = state[at + "attn.qkv.lora_A"], state[at + "attn.qkv.lora_B"]
            block.attn.qkv.weight[:q] += scale * B[:q] @ A[:4]
            block.attn.qkv.weight[q : q + k] += scale * B[q:] @ A[4:]
            whole, gate, up = slice(None), slice(0, size), slice(size, None)
            for module, part, rows in (
                (block.attn.proj, "attn.proj", whole),
                (block.mlp.proj, "mlp.proj", whole),
                (block.mlp.gate_up, "mlp.fc_1", gate),
                (block.mlp.gate_up, "mlp.fc_2", up),
            ):
                module.weight[rows] += scale * state[f"{at}{part}.lora_B"] @ state[f"{at}{part}.lora_A"]
        model.lm_head.weight += 2.0 * state["lm_head.lora_B"] @ state["lm_head.lora_A"]
        assert torch.allclose(found(tokens(model)), model(tokens(model)), atol=1e-4)
    assert lora.lora_layers(found)


def test_what_does_not_fit_is_refused_by_name(cli, llama, tmp_path):
    folder = litgpt_folder(llama, tmp_path / "theirs")
    whole = dict(litgpt_dir=folder, out_dir=tmp_path / "ours")
    settings, state = yaml.safe_load((folder / "model_config.yaml").read_text()), torch.load(folder / "lit_model.pth")

    def with_settings(**fields):
        (folder / "model_config.yaml").write_text(yaml.dump(settings | fields))
        return cli(SCRIPT, **whole)

    def with_tensors(change):
        torch.save(change(dict(state)), folder / "lit_model.pth")
        return cli(SCRIPT, **whole)

    with_settings(n_layer=9).refused("model_config.yaml", "n_layer is 9, but by config.json it is 2")
    with_settings()
    shutil.rmtree(tmp_path / "ours")
    with_tensors(lambda s: {n: t for n, t in s.items() if n != "transformer.ln_f.weight"}).refused(
        "lacks transformer.ln_f"
    )
    with_tensors(lambda s: s | {"transformer.x": torch.zeros(1)}).refused("has besides transformer.x")
    with_tensors(lambda s: s | {"transformer.ln_f.weight": torch.zeros(3)}).refused("ln_f.weight is (3,)")
    with_tensors(lambda s: s | {"step": 3}).refused("holds more than tensors")
    (folder / "model_config.yaml").write_text("a: [")
    with_tensors(lambda s: s).refused("not readable as YAML")
    (folder / "config.json").unlink()
    cli(SCRIPT, **whole).refused("config.json: no such file", "on the hub")
    cli(SCRIPT, **whole, lora="true").refused("--lora true goes with --checkpoint_dir", code=2)
    cli(SCRIPT, **whole | {"checkpoint_dir": llama}, lora="true").refused("has no lit_model.pth.lora", "found")
    cli(SCRIPT, litgpt_dir=folder).refused("--out_dir", code=2)
    assert not (tmp_path / "ours").exists()
