"""The methods that are values of LoRA's flags, and IA3: each over several layouts, and against PEFT."""

from dataclasses import replace

import peft
import pytest
import torch
from peft.optimizers import create_loraplus_optimizer
from torch import Tensor, nn

from helpers import method_table
from helpers.compare import identical, in_steps, off, tokens
from helpers.methods import EVERYTHING, LORA_METHODS, METHODS, STYLE, as_if_trained, attach_fresh, lora_files, make
from helpers.paths import ROOT
from helpers.runs import final, metrics, planner_of
from helpers.steps import random_row, train
from helpers.tiny_models import LAYOUTS, Tiny, make_base, tiny_hf_model
from lit_gpt import GPT
from lit_gpt.checkpoints import folder
from lit_gpt.checkpoints.base_model import load_model
from lit_gpt.conversion import hf, hf_shards
from lit_gpt.conversion.peft import lora as peft_files
from lit_gpt.errors import UsageError, UserError
from lit_gpt.families.registry import config_from_name
from lit_gpt.generation.steps.native import NativeStep
from lit_gpt.kernels import build
from lit_gpt.methods import finetuned_file, finetuned_model, lora
from lit_gpt.methods.method import Start
from lit_gpt.methods.registry import config_class, make_method
from lit_gpt.model.gpt import quantize
from lit_gpt.model.packed_inputs import Targets
from lit_gpt.quantization.modules import QuantizedLinear
from lit_gpt.training.args import OptimizationArgs
from lit_gpt.training.optimizers import InBackward, groups, make_optimizer

# Grouped queries; shared norm and fused qkv; learned positions and biases; experts. The others are slow.
FEW = [("llama", "llama3"), ("falcon", "7b"), ("gpt2", "gpt2"), ("mixtral", "mixtral")]
APART = {  # transformers' layers of Llama, by ours
    "attn.qkv": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
    "attn.proj": ["self_attn.o_proj"],
    "mlp.gate_up": ["mlp.gate_proj", "mlp.up_proj"],
    "mlp.proj": ["mlp.down_proj"],
}


def converted(layout: tuple[str, str], place) -> Tiny:
    model = tiny_hf_model(*layout)
    model.save_pretrained(place)
    hf.convert(place, hf_shards.StoredWeights(place))
    return Tiny(place, model)


@pytest.fixture(
    scope="module",
    params=[pytest.param(layout, marks=[] if layout in FEW else pytest.mark.slow) for layout in LAYOUTS],
    ids="-".join,
)
def layout(request, tmp_path_factory) -> Tiny:
    return converted(request.param, tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def llama_like(tmp_path_factory) -> Tiny:
    return converted(FEW[0], tmp_path_factory.mktemp("tiny"))


def fresh(tiny: Tiny, name: str, **settings) -> GPT:
    torch.manual_seed(1)
    return attach_fresh(load_model(tiny.folder), name, **settings)


def trained(tiny: Tiny, name: str, **settings) -> GPT:
    return as_if_trained(fresh(tiny, name, **settings))


@pytest.mark.parametrize("name", METHODS)
def test_a_method_over_layouts(layout: Tiny, name: str):
    """Fresh it is the base; what should train moves, all of it and nothing else; packed as alone; cached as not."""
    try:
        model, idx = fresh(layout, name), tokens(layout.hf)
    except UsageError as refused:
        assert "norms" in name and "have no weights" in str(refused)
        pytest.skip(str(refused))
    with torch.no_grad():
        base, logits = load_model(layout.folder)(idx), model.eval()(idx)
    assert off(logits, base) < 1e-5 if "PiSSA" in name or "OLoRA" in name else torch.equal(logits, base)
    before = {name: p.clone() for name, p in model.named_parameters()}
    trains = {name for name, p in model.named_parameters() if p.requires_grad}
    train(model)
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == trains and trains <= finetuned_file.trained_state(model).keys()

    as_if_trained(model)
    row, at = random_row(), 0
    with torch.no_grad():
        packed, expected = model(row.idx, segments=row.segments), model(idx)
        for length in row.segments.lengths:
            assert off(packed[:, at : at + length], model(row.idx[:, at : at + length])) < 1e-5
            at += length
        cache = model.kv_cache(2, idx.size(1))
        assert off(torch.cat([model(step, cache=cache) for step in in_steps(idx)], dim=1), expected) < 1e-5
        assert off(expected, base) > 1e-3
        if not (method := make(name)).merges:
            return
        assert off(method.merge(model)(idx), expected) < 1e-5
    assert not [name for name, module in model.named_modules() if hasattr(module, "trained_parameters")]


@pytest.mark.parametrize("name", METHODS)
def test_save_and_load(llama_like: Tiny, tmp_path, name, monkeypatch):
    """The file alone gives the model back, without a decomposition."""
    model, idx = trained(llama_like, name), tokens(llama_like.hf)
    base = folder.fingerprint(folder.load_state(llama_like.folder))
    method = make(name)
    kind, record = method.name, {"hyperparameters": method.settings, "prompt_style": STYLE}
    finetuned_file.save_file(tmp_path / "f.pth", kind, base, finetuned_file.trained_state(model), **record)
    monkeypatch.setattr(torch.linalg, "svd", None)
    monkeypatch.setattr(torch.linalg, "qr", None)
    again, _ = finetuned_model.load_finetuned(llama_like.folder, tmp_path / "f.pth", kind)
    with torch.no_grad():
        assert torch.equal(again(idx), model(idx))


@pytest.mark.skipif(build.library("decode") is None, reason="needs a C++ compiler")
@pytest.mark.parametrize("format", [None, "nf4"])
@pytest.mark.parametrize("name", METHODS)
def test_decoding_and_merging_of_quantized_bases(llama_like: Tiny, name, format):
    """The fast step is recorded from each method, and gives the model's logits; so does a merged model."""
    from helpers.native import native_logits

    if format and "embeddings" in name:
        pytest.skip("refused")
    torch.manual_seed(1)
    base = load_model(llama_like.folder)
    model = as_if_trained(attach_fresh(quantize(base, format) if format else base, name))
    idx = tokens(llama_like.hf, rows=1, length=9)
    with torch.no_grad():
        logits = model(idx)
        assert off(native_logits(NativeStep(model), model, idx[0].tolist()), logits[0, -1]) < (1e-3 if format else 1e-5)
        if not (method := make(name)).merges:
            return
        merged = method.merge(model)
        assert off(merged(idx), logits) < 1e-5
    assert (
        not format or not name.startswith("LoRA") or not any(isinstance(m, QuantizedLinear) for m in merged.modules())
    )


# --- against PEFT


def by_peft(layer_path: str) -> list[str]:
    _, i, module = layer_path.split(".", 2)
    return [f"base_model.model.model.layers.{i}.{name}" for name in APART[module]]


def losses(ours: GPT, theirs: nn.Module, idx: Tensor) -> tuple[Tensor, Tensor]:
    """Assert the same logits, and return both losses."""
    logits = theirs(idx).logits
    assert off(ours.eval()(idx), logits) < 1e-5
    loss = ours(idx, targets=Targets(torch.arange(idx.size(1) - 1), idx[0, 1:])) / (idx.size(1) - 1)
    return loss, nn.functional.cross_entropy(logits[0, :-1], idx[0, 1:])


@pytest.mark.parametrize("name", ["rsLoRA", "DoRA"])
def test_logits_and_gradients_equal_peft(llama_like: Tiny, tmp_path, name):
    """PEFT loads our export, and has the same gradients of A, B and magnitudes."""
    model = trained(llama_like, name, head=False)
    peft_files.write(tmp_path, model, replace(EVERYTHING, **METHODS[name]), str(llama_like.folder))
    theirs = peft.PeftModel.from_pretrained(tiny_hf_model(*FEW[0]), tmp_path, is_trainable=True).eval()
    for loss in losses(model, theirs, tokens(llama_like.hf, rows=1)):
        loss.backward()
    grads = {name: p.grad for name, p in theirs.named_parameters()}
    for path, layer in lora.lora_layers(model).items():
        magnitudes = () if layer.magnitude is None else layer.magnitude.grad.split(layer.sizes)
        As, Bs = layer.lora_A.grad.split(layer.r), layer.lora_B.grad.split(layer.sizes)
        for i, prefix in enumerate(by_peft(path)):
            assert off(As[i], grads[f"{prefix}.lora_A.default.weight"]) < 1e-5
            assert off(Bs[i], grads[f"{prefix}.lora_B.default.weight"]) < 1e-5
            if magnitudes:
                assert off(magnitudes[i], grads[f"{prefix}.lora_magnitude_vector.default.weight"]) < 1e-5


def test_vera_equals_peft(llama_like: Tiny):
    """In PEFT as here all layers take their corner of one A and one B."""
    model = trained(llama_like, "VeRA", head=False)
    config = peft.VeraConfig(r=4, target_modules="all-linear", vera_dropout=0.0)
    theirs = peft.get_peft_model(tiny_hf_model(*FEW[0]), config).eval()
    theirs.base_model.vera_A["default"].copy_(model.lora_shared["all"].lora_A)
    theirs.base_model.vera_B["default"].copy_(model.lora_shared["all"].lora_B)
    parameters = dict(theirs.named_parameters())
    pairs = []
    for path, layer in lora.lora_layers(model).items():
        d, b = layer.rank_scale.split(layer.r), layer.row_scale.split(layer.sizes)
        for i, prefix in enumerate(by_peft(path)):
            for part, key, mine in ((i, "d", d), (i, "b", b)):
                parameter = parameters[f"{prefix}.vera_lambda_{key}.default"]
                parameter.data.copy_(mine[part].detach())
                pairs.append((layer, key, part, parameter))
    for loss in losses(model, theirs, tokens(llama_like.hf, rows=1)):
        loss.backward()
    for layer, key, part, parameter in pairs:
        mine = layer.rank_scale.grad.split(layer.r) if key == "d" else layer.row_scale.grad.split(layer.sizes)
        assert off(mine[part], parameter.grad) < 1e-5


@pytest.mark.parametrize("name", ["PiSSA", "OLoRA"])
def test_starts_from_weights_equal_pefts(llama_like: Tiny, name):
    """PEFT moves a part of the base into B A; here the base stays. Both go the same way, whatever the SVD's signs."""
    model = fresh(llama_like, name, head=False)
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", init_lora_weights=METHODS[name]["init"])
    theirs, idx = peft.get_peft_model(tiny_hf_model(*FEW[0]), config).eval(), tokens(llama_like.hf, rows=1)
    with torch.no_grad():
        assert off(theirs(idx).logits, load_model(llama_like.folder)(idx)) < 1e-5
    optimizers = [torch.optim.SGD([p for p in m.parameters() if p.requires_grad], lr=0.1) for m in (model, theirs)]
    for _ in range(2):
        for loss, optimizer in zip(losses(model, theirs, idx), optimizers, strict=True):
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    losses(model, theirs, idx)
    with torch.no_grad():
        assert off(model(idx), load_model(llama_like.folder)(idx)) > 1e-3


@pytest.mark.parametrize("in_backward", [False, True])
def test_learning_rates_of_lora_plus_equal_pefts(llama_like: Tiny, tmp_path, in_backward):
    """Two steps by PEFT's groups. Of DoRA, PEFT has the magnitudes faster too; here, as in the paper, B alone is."""
    config = replace(EVERYTHING, head=False, lr_ratio=16.0)
    model, method = trained(llama_like, "LoRA+", head=False), lora.LoRA(config)
    peft_files.write(tmp_path, model, config, str(llama_like.folder))
    theirs = peft.PeftModel.from_pretrained(tiny_hf_model(*FEW[0]), tmp_path, is_trainable=True).eval()
    args = OptimizationArgs(optimizer="sgd", learning_rate=0.05, weight_decay=0.0)
    parameters = groups(model, method, args)
    ours = InBackward(parameters, args) if in_backward else make_optimizer(parameters, args)
    peers = create_loraplus_optimizer(theirs, torch.optim.SGD, lr=0.05, loraplus_lr_ratio=16)
    for _ in range(2):
        for loss, optimizer in zip(losses(model, theirs, tokens(theirs, rows=1)), (ours, peers), strict=True):
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    losses(model, theirs, tokens(theirs, rows=1))
    assert [group["lr"] for group in ours.state_dict()["param_groups"]] == [0.05, 0.8] or in_backward
    dora = groups(fresh(llama_like, "DoRA", head=False, lr_ratio=16.0), method, args)
    assert [(group["lr_ratio"], {p.ndim for p in group["params"]}) for group in dora] == [(1.0, {1, 2}), (16.0, {2})]


def test_ia3_equals_peft(llama_like: Tiny):
    model = trained(llama_like, "IA3")
    config = peft.IA3Config(target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"])
    theirs = peft.get_peft_model(tiny_hf_model(*FEW[0]), config).eval()
    parameters, pairs = dict(theirs.named_parameters()), []
    for i, block in enumerate(model.h):
        size = model.config.qkv_sizes[1]
        factors = (block.attn.qkv.factors, block.attn.qkv.factors, block.mlp.proj.factors)
        places = (slice(0, size), slice(size, 2 * size), slice(None))
        for name, mine, place in zip(
            ("self_attn.k_proj", "self_attn.v_proj", "mlp.down_proj"), factors, places, strict=True
        ):
            parameter = parameters[f"base_model.model.model.layers.{i}.{name}.ia3_l.default"]
            parameter.data.copy_(mine.detach()[place].view_as(parameter))
            pairs.append((mine, place, parameter))
    for loss in losses(model, theirs, tokens(llama_like.hf, rows=1)):
        loss.backward()
    for mine, place, parameter in pairs:
        assert off(mine.grad[place], parameter.grad.flatten()) < 1e-5


@pytest.mark.parametrize("layout_name", [FEW[0], FEW[1]], ids=["apart", "fused"])
@pytest.mark.parametrize("name", LORA_METHODS)
def test_peft_loads_each_export_and_we_load_it_back(tmp_path, name, layout_name):
    tiny = converted(layout_name, tmp_path / "base")
    model, idx = trained(tiny, name), tokens(tiny.hf)
    peft_files.write(tmp_path, model, replace(EVERYTHING, **METHODS[name]), str(tiny.folder))
    with torch.no_grad():
        logits = model(idx)
        theirs = peft.PeftModel.from_pretrained(tiny_hf_model(*layout_name), tmp_path).eval()
        assert off(theirs(idx).logits, logits) < 1e-5
        base = load_model(tiny.folder)
        settings, state, _ = peft_files.read(tmp_path, base.config, dict(base.state_dict()))
        lora.attach(base, settings)
        finetuned_file.load_trained(base, state, tmp_path)
        assert off(base.eval()(idx), logits) < 1e-5
    assert settings.update == ("dora" if name == "DoRA" else "plain")


def test_a_dora_adapter_that_lacks_a_magnitude_is_refused(llama_like: Tiny, tmp_path):
    from safetensors.torch import load_file, save_file

    model = trained(llama_like, "DoRA")
    peft_files.write(tmp_path, model, replace(EVERYTHING, update="dora"), "base")
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    del tensors["base_model.model.model.layers.1.mlp.up_proj.lora_magnitude_vector"]
    save_file(tensors, path)
    base = load_model(llama_like.folder)
    with pytest.raises(UserError, match="up_proj.lora_magnitude_vector .* expected"):
        peft_files.read(tmp_path, base.config, dict(base.state_dict()))


@pytest.mark.parametrize("quantized", [False, True])
def test_several_loras_of_each_method_answer_in_one_batch(tmp_path, quantized):
    """Each row is what it would be with its LoRA alone; DoRA's, which scales the base, is refused by name."""
    from lit_gpt.checkpoints.base_model import BaseCheckpoint
    from lit_gpt.methods.multi_lora import LoRAPool
    from lit_gpt.text.prompt_style import PromptStyle

    place = make_base(tmp_path)
    format = "nf4" if quantized else None
    configs = [replace(EVERYTHING, **settings) for settings in LORA_METHODS.values()]
    paths = dict(zip(LORA_METHODS, lora_files(place, configs, format), strict=True))
    base, dora = BaseCheckpoint.open(place, format), paths.pop("DoRA")
    pool = LoRAPool.beside(base, paths.values(), PromptStyle.from_dict(STYLE))
    idx = torch.randint(300, (1, 9), generator=torch.Generator().manual_seed(0)).expand(len(paths), -1)
    with torch.no_grad():
        pool.choose([pool.numbers[path.resolve()] for path in paths.values()])
        together = pool.model.eval()(idx)
        for row, path in zip(together, paths.values(), strict=True):
            alone, _ = finetuned_model.load_finetuned(place, path, "lora")
            assert off(row, alone(idx[:1])[0]) < 1e-5
    with pytest.raises(UserError, match="lora_update dora.*merge it"):
        pool.load(dora)


# --- equations


def test_updates_follow_their_equations_in_float64(llama_like: Tiny):
    """Of Tied-LoRA and MultiLoRA, which PEFT does not have, of one projection."""
    tied, multi = trained(llama_like, "Tied-LoRA"), trained(llama_like, "MultiLoRA")
    base, x = load_model(llama_like.folder).h[1].attn.qkv, torch.randn(3, 64)
    q = tied.config.qkv_sizes[0]
    expected = base(x).double()[:, :q]
    layer, shared = tied.h[1].attn.qkv, tied.lora_shared["attn_qkv"]
    A, B = shared.lora_A[:4].double(), shared.lora_B[:q].double()
    u, v = layer.rank_scale[:4].double(), layer.row_scale[:q].double()
    update = x.double() @ (torch.diag(v) @ B @ torch.diag(u) @ A).T
    assert off(layer(x)[:, :q].double(), expected + 2.0 * update) < 1e-6
    layer, update = multi.h[1].attn.qkv, 0
    for i in range(3):
        A, B = layer.lora_A[4 * i : 4 * (i + 1)].double(), layer.lora_B[:q, 4 * i : 4 * (i + 1)].double()
        update = update + x.double() @ (torch.diag(layer.gate[:q, i].double()) @ B @ A).T
    assert off(layer(x)[:, :q].double(), expected + 2.0 * update) < 1e-6


def test_pissa_takes_the_best_approximation(llama_like: Tiny):
    layer = fresh(llama_like, "PiSSA").h[0].attn.proj
    weight = layer.linear.weight
    left = torch.linalg.matrix_norm(weight - layer.scale * layer.lora_B @ layer.lora_A)
    assert off(left, torch.linalg.svdvals(weight)[4:].norm()) < 1e-5


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"r": 8}, 3_506_176),
        ({"r": 8, "scaling": "sqrt_r"}, 3_506_176),
        ({"r": 8, "lr_ratio": 16}, 3_506_176),
        ({"r": 8, "train": "B"}, 1_179_648),
        ({"r": 8, "update": "dora"}, 3_653_632),
        ({"r": 256, "update": "vera"}, 163_840),
        ({"r": 8, "update": "tied"}, 257_536),
        ({"r": 8, "update": "multi"}, 10_960_896),
        ({"r": 8, "update": "qa"}, 1_216_000),
        ({"r": 8, "init": "pissa"}, 3_506_176),
        ({"r": 8, "init": "olora"}, 3_506_176),
    ],
)
def test_trainable_parameters_of_falcon_7b(settings, expected):
    with torch.device("meta"):
        model = lora.attach(GPT(config_from_name("falcon-7b")), lora.LoRAConfig(**settings))
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == expected


def test_trainable_parameters_of_ia3_on_falcon_7b():
    with torch.device("meta"):
        model = make_method("ia3", config_class("ia3")()).attach(GPT(config_from_name("falcon-7b")))
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 585_728


# --- runs


@pytest.mark.parametrize(
    "change",
    [
        {"lora_init": "pissa", "lora_lr_ratio": 16},
        pytest.param({"lora_update": "dora"}, marks=pytest.mark.slow),
        pytest.param({"lora_update": "vera"}, marks=pytest.mark.slow),
        pytest.param({"lora_update": "tied"}, marks=pytest.mark.slow),
        pytest.param({"lora_update": "multi"}, marks=pytest.mark.slow),
        pytest.param({"lora_train": "B", "neftune_alpha": 5}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_a_resumed_run_ends_with_the_same_bits(cli, flags, monkeypatch, change):
    """And does not decompose a weight again."""
    flags = flags | change | {"max_steps": 4, "learning_rate": 0.01}
    result = cli("finetune/lora.py", **flags)
    assert result.code == 0, result.err
    whole, rows = final(flags["out_dir"]), metrics(flags["out_dir"])
    (flags["out_dir"] / "lit_model_lora_finetuned.pth").unlink()
    max((flags["out_dir"] / "state").iterdir()).unlink()
    monkeypatch.setattr(torch.linalg, "svd", None)
    result = cli("finetune/lora.py", **flags | {"resume": "auto"})
    assert result.code == 0 and "resumed after step" in result.out, result.err
    assert identical(final(flags["out_dir"]), whole) and metrics(flags["out_dir"]) == rows
    start = {"finetuned_path": flags["out_dir"] / "lit_model_lora_finetuned.pth"}
    assert cli("finetune/lora.py", **flags | start | {"out_dir": flags["out_dir"] / "on"}).code == 0
    start |= {"out_dir": flags["out_dir"] / "other", "lora_alpha": 3}
    cli("finetune/lora.py", **flags | start).refused("--lora_alpha 3", "give that", code=2)


def test_what_vera_and_fa_keep_is_in_the_file(cli, flags):
    """A file of frozen matrices is whole: random numbers are not drawn again."""
    for change, names in (({"lora_update": "vera"}, {"lora_shared.all.lora_A"}), ({"lora_train": "B"}, set())):
        own = flags | change | {"max_steps": 3, "out_dir": flags["out_dir"] / next(iter(change))}
        assert cli("finetune/lora.py", **own).code == 0
        assert names <= final(own["out_dir"]).keys()
        assert any(name.endswith("lora_A") for name in final(own["out_dir"]))


def test_ia3_from_training_to_an_answer(cli, flags):
    flags = {k: v for k, v in flags.items() if not k.startswith("lora")} | {"learning_rate": 0.05}
    result = cli("finetune/ia3.py", **flags)
    assert result.code == 0, result.err
    assert "lr" in metrics(flags["out_dir"])[0]
    finetuned_path = flags["out_dir"] / "lit_model_ia3_finetuned.pth"
    place = {"checkpoint_dir": flags["checkpoint_dir"], "finetuned_path": finetuned_path}
    result = cli("generate/ia3.py", **place, prompt="describe the cat 1", temperature=0, max_new_tokens=5)
    assert result.code == 0 and "tokens" in result.err, result.err
    lora_path = {"lora_path": place["finetuned_path"], "checkpoint_dir": flags["checkpoint_dir"]}
    cli("generate/lora.py", **lora_path, prompt="a").refused("trained by the method ia3", "expected lora")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"lora_update": "vera", "lora_train": "B"}, ["--lora_update vera with --lora_train B"]),
        ({"lora_update": "multi", "lora_init": "pissa"}, ["--lora_update multi with --lora_init pissa"]),
        ({"lora_update": "vera", "lora_lr_ratio": 2}, ["--lora_lr_ratio 2"]),
        ({"lora_init": "olora", "lora_r": 65}, ["--lora_init olora", "only rank"]),
        ({"lora_update": "tied", "strategy": "fsdp"}, ["--lora_update tied", "fsdp", "ddp"]),
        ({"lora_update": "loha"}, ["--lora_update", "plain"]),
    ],
    ids=str,
)
def test_contradicting_choices_are_refused_in_one_line(cli, flags, change, words):
    cli("finetune/lora.py", **flags | change).refused(*words, code=2)
    assert not flags["out_dir"].exists()


def test_dora_on_experts_is_refused(tmp_path):
    model = load_model(converted(("mixtral", "mixtral"), tmp_path).folder)
    with pytest.raises(UsageError, match="--lora_update dora: .* has experts"):
        lora.attach(model, replace(EVERYTHING, update="dora"))


def test_fa_needs_less_memory_for_activations():
    """By the plan, of whose step the tensors are counted."""
    config = config_from_name("pythia-70m")
    planners = [planner_of(config, "lora", lora_mlp="true", lora_train=train) for train in ("both", "B")]
    plans = [planner.plan(([1024], 1024), "none") for planner in planners]
    assert plans[1].activations < 0.9 * plans[0].activations and plans[1].trainable < plans[0].trainable


# --- the table in the tutorial


def test_the_tables_of_combinations_are_what_is_so(tmp_path):
    page = (ROOT / "tutorials/methods.md").read_text("utf-8")
    assert method_table.what_works(tmp_path) in page
    assert method_table.what_combines() in page


# --- EVA


@torch.no_grad()
def test_eva_starts_from_the_directions_of_the_inputs(llama_like: Tiny):
    """Of each layer: A has orthogonal rows that span the largest singular vectors of what the base gives it."""
    row, inputs = random_row(), {}
    base = load_model(llama_like.folder)
    for path, module in base.named_modules():
        if isinstance(module, nn.Linear):
            module.register_forward_pre_hook(lambda _, x, path=path: inputs.__setitem__(path, x[0].flatten(0, -2)))
    expected = base(row.idx, segments=row.segments)
    model = load_model(llama_like.folder)
    method = make("LoRA", init="eva")
    method.attach(model)
    method.initialize(model, Start(lambda text: [], lambda samples: row, 1))
    assert torch.equal(model.eval()(row.idx, segments=row.segments), expected)
    for path, layer in lora.lora_layers(model).items():
        U, S, Vh = torch.linalg.svd(inputs[path].double(), full_matrices=False)
        for A in layer.lora_A.split(4):
            assert off(A.T.double() @ A.double(), Vh[:4].T @ Vh[:4]) < 1e-3, path


def test_eva_from_the_command_line(cli, flags):
    result = cli("finetune/lora.py", **flags | {"lora_init": "eva", "max_steps": 2, "warmup_steps": 0})
    assert result.code == 0, result.err
    flags |= {"lora_init": "eva", "lora_update": "vera", "out_dir": flags["out_dir"] / "x"}
    cli("finetune/lora.py", **flags).refused("--lora_update vera with --lora_init eva", code=2)
