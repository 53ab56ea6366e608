"""Every method over every family and layout; and each finetune script from start to end."""

import json
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

from helpers.cli import run_process, spawn
from helpers.compare import identical, in_steps, off, tokens
from helpers.methods import STYLE
from helpers.runs import method_flags, wait_for_step, weights_of
from helpers.steps import train
from helpers.tiny_models import Tiny
from lit_gpt import GPT
from lit_gpt.checkpoints import folder
from lit_gpt.checkpoints.base_model import load_model
from lit_gpt.errors import UsageError
from lit_gpt.families.registry import config_from_name
from lit_gpt.methods import adapter, adapter_v2, finetuned_file, finetuned_model, lora
from lit_gpt.methods.registry import config_class, make_method
from lit_gpt.model.alibi import alibi_slopes

ADAPTER = adapter.AdapterConfig(prompt_length=4, start_layer=1)
LORA = lora.LoRAConfig(r=4, key=True, projection=True, mlp=True, head=True, dropout=0.1)
ATTACH: dict[str, Callable[[GPT], GPT]] = {
    "adapter": lambda model: adapter.attach(model, ADAPTER),
    "adapter_v2": lambda model: adapter_v2.attach(model, ADAPTER),
    "lora+adapter": lambda model: adapter.attach(lora.attach(model, LORA), ADAPTER),
    "adapter+lora": lambda model: lora.attach(adapter.attach(model, ADAPTER), LORA),
}


@pytest.fixture(params=ATTACH)
def attach(request) -> Callable[[GPT], GPT]:
    return ATTACH[request.param]


def attached(tiny: Tiny, attach, scramble: bool = True, dtype=None) -> GPT:
    torch.manual_seed(1)
    model = load_model(tiny.folder, dtype)
    if attach is not ATTACH["adapter_v2"] and all(block.attn is None for block in model.h):
        with pytest.raises(UsageError, match="no layer from there on has attention; use LoRA"):
            attach(model)
        pytest.skip("refused")
    model = attach(model)
    for parameter in finetuned_file.trained_state(model).values() if scramble else ():
        parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


@torch.no_grad()
def test_fresh_equals_base_exactly(tiny: Tiny, attach):
    idx = tokens(tiny.hf)
    for dtype in (torch.float32, torch.bfloat16):
        base = load_model(tiny.folder, dtype)(idx)
        model = attached(tiny, attach, scramble=False, dtype=dtype).eval()
        assert torch.equal(model(idx), base) and model(idx).dtype == dtype


def test_only_and_all_of_the_variant_trains(tiny: Tiny, attach):
    """Train three steps, for the gates open in the first, and evaluate before and between them."""
    model = attached(tiny, attach, scramble=False)
    before = {name: p.clone() for name, p in model.named_parameters()}
    trains = set(finetuned_file.trained_state(model))
    train(model, steps=3)
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == trains and trains


@torch.no_grad()
def test_with_and_without_cache(tiny: Tiny, attach):
    model, idx = attached(tiny, attach).eval(), tokens(tiny.hf)
    cache = model.kv_cache(2, idx.size(1))
    assert off(torch.cat([model(step, cache=cache) for step in in_steps(idx)], dim=1), model(idx)) < 1e-5


@pytest.mark.parametrize("method", ["adapter", "adapter_v2"])
def test_save_and_load(tiny: Tiny, tmp_path, method):
    model, idx = attached(tiny, ATTACH[method]).eval(), tokens(tiny.hf)
    base = folder.fingerprint(folder.load_state(tiny.folder))
    record = {"hyperparameters": vars(ADAPTER), "prompt_style": STYLE}
    finetuned_file.save_file(tmp_path / "f.pth", method, base, finetuned_file.trained_state(model), **record)
    again, _ = finetuned_model.load_finetuned(tiny.folder, tmp_path / "f.pth", method)
    with torch.no_grad():
        assert torch.equal(again(idx), model(idx))
    stored = torch.load(tmp_path / "f.pth")["state"]
    assert stored.keys() == {name for name, p in model.named_parameters() if p.requires_grad}


@torch.no_grad()
def test_adapter_follows_the_papers_equation(tiny: Tiny):
    """Compute S^g = [softmax(S_prompt) g ; softmax(S_tokens)] (equation 6) and S^g V head by head."""
    model = attached(tiny, ATTACH["adapter"]).eval()
    attention, config = model.h[1].attn, model.config.at(1)
    attention.prefix.gate.normal_()
    x, T, size = torch.randn(1, 9, config.n_embd), 9, config.head_size
    rotation = model.rotations(torch.arange(T), (T,), x.dtype)[1]
    q, k, v = (y[0] for y in attention.project_qkv(x, rotation))  # each (heads, T, head_size)
    _, pk, pv = (y[0] for y in attention.project_qkv(attention.prefix.prompt[None], None))
    behind = torch.arange(T)[:, None] - torch.arange(T)
    hidden = (behind < 0) | (behind >= (config.window(1) or T))
    slopes = alibi_slopes(config.n_head) * config.alibi
    scale, cap = config.attention_scale or size**-0.5, config.attention_softcap or 1e6

    def score(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        return cap * torch.tanh(q @ k.T * scale / cap)

    outputs = []
    for head in range(config.n_head):
        group = head * config.n_query_groups // config.n_head
        bias = -slopes[head] * behind
        if config.alibi_rounded:
            bias = scale * (slopes[head].bfloat16() * torch.arange(T)).float()
        scores = (score(q[head], k[group]) + bias).masked_fill(hidden, -torch.inf)
        if config.attention_sinks:
            scores = torch.cat([scores, attention.sinks[head].expand(T, 1)], dim=1)
        gated = score(q[head], pk[group]).softmax(-1) * attention.prefix.gate[head]
        outputs.append(torch.cat([gated, scores.softmax(-1)[:, :T]], dim=1) @ torch.cat([pv[group], v[group]]))
    expected = F.linear(torch.cat(outputs, dim=-1), attention.proj.weight, attention.proj.bias)
    actual = attention.proj(attention.attend(*attention.project_qkv(x, rotation), None, None))
    assert off(actual[0], expected) < 1e-5


@torch.no_grad()
def test_adapter_v2_scales_and_shifts_each_linear_layer(tiny: Tiny):
    model, base = attached(tiny, ATTACH["adapter_v2"]), load_model(tiny.folder)
    x = torch.randn(3, base.config.n_embd)
    for name, plain in base.named_modules():
        if isinstance(plain, torch.nn.Linear) and plain.in_features == base.config.n_embd:
            layer = model.get_submodule(name)
            assert off(layer(x), layer.scale * (plain(x) + layer.shift)) < 1e-6


@pytest.mark.parametrize(("method", "expected"), [("adapter", 1_365_330), ("adapter_v2", 3_839_186)])
def test_trainable_parameters_of_falcon_7b(method, expected):
    with torch.device("meta"):
        model = make_method(method, config_class(method)()).attach(GPT(config_from_name("falcon-7b")))
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == expected


@pytest.mark.subprocess
@pytest.mark.parametrize(("method", "moment"), [("adapter", 2), ("adapter_v2", 8), ("full", 5)])
def test_finetune_resume_and_generate(cli, flags, llama, method, moment):
    """A run that is killed and resumed ends with the same bits, and what it leaves answers."""
    flags, script = method_flags(flags, method), f"finetune/{method}.py"
    result = run_process(script, **flags)
    assert result.code == 0, result.err
    summary = json.loads((flags["out_dir"] / "summary.json").read_text())
    assert summary["method"] == method and summary["val_loss_last"] < summary["val_loss_first"]
    killed = flags | {"out_dir": flags["out_dir"].with_name("killed"), "resume": "auto"}
    process = spawn(script, **killed)
    wait_for_step(process, killed["out_dir"], moment)
    process.kill()
    process.communicate()
    result = run_process(script, **killed)
    assert result.code == 0, result.err
    assert identical(weights_of(flags["out_dir"], method), weights_of(killed["out_dir"], method))
    place = {"checkpoint_dir": flags["out_dir"] if method == "full" else llama}
    if method != "full":
        place["adapter_path"] = flags["out_dir"] / f"lit_model_{method}_finetuned.pth"
    result = cli(f"generate/{method}.py", **place, prompt="describe the cat 1", temperature=0, max_new_tokens=5)
    assert result.code == 0 and "tokens" in result.err, result.err


def test_full_finetuning_in_bf16_arithmetic(cli, flags, llama):
    """Weights are float32 while they train, and have the base's dtype in the result."""
    result = cli("finetune/full.py", **method_flags(flags, "full") | {"precision": "bf16"})
    assert result.code == 0, result.err
    actual, base = weights_of(flags["out_dir"], "full"), folder.load_state(llama)
    assert actual.keys() == base.keys() and all(actual[k].dtype == base[k].dtype for k in base)
    assert all(not torch.equal(actual[k], base[k]) for k in base)
