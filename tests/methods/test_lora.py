"""LoRA over every family and layout, and against PEFT."""

from dataclasses import asdict, replace

import pytest
import torch
from peft import LoraConfig as PeftConfig
from peft import PeftModel, get_peft_model, set_peft_model_state_dict

from helpers.compare import off, tokens
from helpers.methods import EVERYTHING, ONE_EACH, STYLE, SWITCHES
from helpers.steps import train
from helpers.tiny_models import Tiny, tiny_hf_model
from lit_gpt import GPT
from lit_gpt.checkpoints import folder
from lit_gpt.checkpoints.base_model import load_model
from lit_gpt.conversion import hf, hf_shards
from lit_gpt.conversion import logits as verify
from lit_gpt.conversion.peft import layout as peft_layout
from lit_gpt.conversion.peft import lora as peft_files
from lit_gpt.errors import UsageError, UserError
from lit_gpt.families.registry import config_from_name
from lit_gpt.methods import finetuned_file, finetuned_model, lora
from lit_gpt.model.packed_inputs import Targets


def attached(tiny: Tiny, config: lora.LoRAConfig = EVERYTHING, scramble: bool = True) -> GPT:
    """Return a model with LoRA whose B is not zero."""
    torch.manual_seed(1)
    model = lora.attach(load_model(tiny.folder), config)
    for layer in lora.lora_layers(model).values() if scramble else ():
        torch.nn.init.normal_(layer.lora_B, std=0.1)
    return model


@torch.no_grad()
def test_fresh_equals_base_exactly(tiny: Tiny):
    idx = tokens(tiny.hf)
    assert torch.equal(attached(tiny, scramble=False).eval()(idx), load_model(tiny.folder)(idx))


def test_only_and_all_of_lora_trains(tiny: Tiny):
    model = attached(tiny, replace(EVERYTHING, dropout=0.1), scramble=False)
    before = {name: p.clone() for name, p in model.named_parameters()}
    train(model)
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {name for name in before if name.endswith(("lora_A", "lora_B"))}


@pytest.mark.parametrize("config", [EVERYTHING, *ONE_EACH], ids=["all", *SWITCHES])
def test_each_projection_gets_its_own_update(llama_like: Tiny, config: lora.LoRAConfig):
    """Each projection's output changes by its own scale * B A x, and nothing else changes."""
    base, model = load_model(llama_like.folder), attached(llama_like, config)
    x = torch.randn(3, 64)
    q, k, v = base.config.qkv_sizes
    rows = {"query": slice(0, q), "key": slice(q, q + k), "value": slice(q + k, q + k + v)}
    layer, plain = model.h[0].attn.qkv, base.h[0].attn.qkv
    chosen = [name for name in rows if getattr(config, name)]
    if not chosen:
        assert torch.equal(layer(x), plain(x))
        return
    expected, A, B = plain(x), layer.lora_A.split(4), layer.lora_B.split([q if n == "query" else k for n in chosen])
    for i, name in enumerate(chosen):
        expected[:, rows[name]] += 2.0 * x @ A[i].T @ B[i].T
    assert off(layer(x), expected) < 1e-6


@pytest.fixture
def llama_like(tmp_path) -> Tiny:
    """Return a model with grouped queries, so that query, key and value differ in size."""
    model = tiny_hf_model("llama", "llama3")
    model.save_pretrained(tmp_path / "c")
    hf.convert(tmp_path / "c", hf_shards.StoredWeights(tmp_path / "c"))
    return Tiny(tmp_path / "c", model)


@torch.no_grad()
def test_merged_equals_unmerged(tiny: Tiny):
    model, idx = attached(tiny).eval(), tokens(tiny.hf)
    unmerged, base = model(idx), load_model(tiny.folder)(idx)
    merged = lora.merge(model)
    assert not lora.lora_layers(merged)
    assert off(unmerged, base) > 1e-2  # the updates do something
    assert off(merged(idx), unmerged) < 1e-5


def test_save_and_load(tiny: Tiny, tmp_path):
    model, idx = attached(tiny).eval(), tokens(tiny.hf)
    state = folder.load_state(tiny.folder)
    path, base = tmp_path / "f.pth", folder.fingerprint(state)
    trained = finetuned_file.trained_state(model)
    finetuned_file.save_file(path, "lora", base, trained, hyperparameters=asdict(EVERYTHING), prompt_style=STYLE)
    again = load_model(tiny.folder)
    finetuned_model.attach_record(again, path, finetuned_file.read_file(path, "lora", base))
    with torch.no_grad():
        assert torch.equal(again.eval()(idx), model(idx))
    assert set(torch.load(path)["state"]) == {name for name, _ in model.named_parameters() if "lora" in name}
    with pytest.raises(UserError, match="another base"):
        finetuned_file.read_file(path, "lora", "0123")


def test_a_file_whose_tensors_are_of_another_rank(tiny: Tiny, tmp_path):
    trained = finetuned_file.trained_state(attached(tiny))
    record = {"hyperparameters": asdict(replace(EVERYTHING, r=8)), "prompt_style": STYLE}
    path = tmp_path / "f.pth"
    finetuned_file.save_file(path, "lora", "b", trained, **record)
    with pytest.raises(UserError, match="does not fit the model"):
        finetuned_model.attach_record(load_model(tiny.folder), path, finetuned_file.read_file(path, "lora", "b"))


def test_fingerprints_tell_models_apart(tiny: Tiny):
    state = folder.load_state(tiny.folder)
    changed = {name: tensor.clone() for name, tensor in state.items()}
    changed[next(name for name in changed if name.startswith("h.1.") and name.endswith(".proj.weight"))] += 1e-3
    assert folder.fingerprint(state) == folder.fingerprint(dict(reversed(state.items())))
    assert folder.fingerprint(state) != folder.fingerprint(changed)


def test_a_wrong_merge_is_refused(llama_like: Tiny):
    model = attached(llama_like)
    idx = torch.randint(model.config.vocab_size, (2, 24), generator=torch.Generator().manual_seed(0))
    expected = verify.float32_logits(model, idx)
    for layer in lora.lora_layers(model).values():
        layer.scale *= 1.5
    with pytest.raises(UserError, match="nothing was written"):
        merged = verify.float32_logits(lora.merge(model), idx)
        verify.require_within(merged, expected, *verify.rounding(torch.float32), "the merge")


@torch.no_grad()
def test_wide_arithmetic_on_narrow_weights(llama_like: Tiny):
    narrow = load_model(llama_like.folder, torch.bfloat16)
    wide = load_model(llama_like.folder, torch.bfloat16).float()
    idx = torch.randint(narrow.config.vocab_size, (2, 24), generator=torch.Generator().manual_seed(0))
    assert off(verify.float32_logits(narrow, idx), wide(idx)) < 1e-6
    assert narrow(idx).dtype == torch.bfloat16  # put back as it was


def test_trainable_parameters_of_falcon_7b():
    with torch.device("meta"):
        model = lora.attach(GPT(config_from_name("falcon-7b")), lora.LoRAConfig(r=8))
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 3_506_176


def test_nothing_to_train_is_refused():
    with pytest.raises(UsageError, match="nothing would be trained"):
        lora.LoRAConfig(**dict.fromkeys(SWITCHES, False))


def test_gradients_equal_peft(llama_like: Tiny):
    """The same updates under PEFT give the same logits, and the same gradients of A and B."""
    config = replace(EVERYTHING, head=False)
    model = attached(llama_like, config)
    names = {
        "attn.qkv": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
        "attn.proj": ["self_attn.o_proj"],
        "mlp.gate_up": ["mlp.gate_proj", "mlp.up_proj"],
        "mlp.proj": ["mlp.down_proj"],
    }
    peft = get_peft_model(llama_like.hf, PeftConfig(r=4, lora_alpha=8, target_modules="all-linear"))
    tensors = {}
    for path, layer in lora.lora_layers(model).items():
        _, i, module = path.split(".", 2)
        for name, A, B in zip(names[module], layer.lora_A.split(4), layer.lora_B.split(layer.sizes), strict=True):
            prefix = f"base_model.model.model.layers.{i}.{name}"
            tensors |= {f"{prefix}.lora_A.weight": A, f"{prefix}.lora_B.weight": B}
    set_peft_model_state_dict(peft, tensors)
    idx = tokens(llama_like.hf, rows=1)
    logits = peft(idx).logits
    assert off(model.eval()(idx), logits) < 1e-5
    torch.nn.functional.cross_entropy(logits[0, :-1], idx[0, 1:]).backward()
    (model(idx, targets=Targets(torch.arange(39), idx[0, 1:])) / 39).backward()
    theirs = dict(peft.named_parameters())
    for path, layer in lora.lora_layers(model).items():
        _, i, module = path.split(".", 2)
        grads = layer.lora_B.grad.split([stop - start for start, stop in layer.parts])
        for name, A, B in zip(names[module], layer.lora_A.grad.split(4), grads, strict=True):
            prefix = f"base_model.model.model.layers.{i}.{name}"
            assert off(A, theirs[f"{prefix}.lora_A.default.weight"].grad) < 1e-5
            assert off(B, theirs[f"{prefix}.lora_B.default.weight"].grad) < 1e-5


def test_latents_and_what_is_made_of_them_equal_peft(tmp_path):
    """DeepSeek V3's low-rank projections: logits, and the gradients of A and B, under PEFT on transformers' model."""
    source = tiny_hf_model("deepseek", "deepseek_v3")
    source.save_pretrained(tmp_path / "c")
    hf.convert(tmp_path / "c", hf_shards.StoredWeights(tmp_path / "c"))
    config = replace(EVERYTHING, mlp=False, head=False)
    model = attached(Tiny(tmp_path / "c", source), config).eval()
    (tmp_path / "peft").mkdir()
    peft_files.write(tmp_path / "peft", model, config, "base")
    settings, state, _ = peft_files.read(tmp_path / "peft", model.config, folder.load_state(tmp_path / "c"))
    trained = finetuned_file.trained_state(model)
    assert settings == config and state.keys() == trained.keys()
    assert all(off(state[name], trained[name]) < 1e-6 for name in trained)
    peft = PeftModel.from_pretrained(source, tmp_path / "peft", is_trainable=True)
    idx = tokens(source, rows=1)
    logits = peft(idx).logits
    assert off(model(idx), logits) < 1e-5
    torch.nn.functional.cross_entropy(logits[0, :-1], idx[0, 1:]).backward()
    (model(idx, targets=Targets(torch.arange(39), idx[0, 1:])) / 39).backward()
    with torch.no_grad():
        for layer in lora.lora_layers(model).values():
            layer.lora_A.copy_(layer.lora_A.grad)
            layer.lora_B.copy_(layer.lora_B.grad)
    theirs = dict(peft.named_parameters())
    gradients = peft_layout.to_peft(model, config.scale)
    latents = {"q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"}
    assert {name.rpartition(".")[2] for name in gradients} == latents
    for name, (A, B) in gradients.items():
        prefix = f"base_model.model.{name}"
        assert off(theirs[f"{prefix}.lora_A.default.weight"].grad, A) < 1e-5, name
        found = theirs[f"{prefix}.lora_B.default.weight"].grad
        assert off(found * (B != 0), B) < 1e-5, name  # a fused layer's zeros are no parameters here
