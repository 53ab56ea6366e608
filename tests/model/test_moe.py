"""Routed experts against the plain formula, token by token."""

import shutil
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch._subclasses.fake_tensor import DynamicOutputShapeException, FakeTensorMode
from torch.autograd import gradcheck

from helpers.cli import run_process
from helpers.compare import off
from helpers.runs import of_method, planner_of, same_run
from helpers.step_trace import Counting
from helpers.tiny_models import tiny_hf_model
from lit_gpt import GPT, Config
from lit_gpt.conversion import hf, hf_shards
from lit_gpt.hardware import on_meta
from lit_gpt.kernels.policy import use_policy
from lit_gpt.methods import adapter_v2, lora
from lit_gpt.model import moe
from lit_gpt.model.mlp import MoE
from lit_gpt.model.packed_inputs import Segments, Targets
from lit_gpt.training.memory.plan import materialize
from lit_gpt.training.memory.tracker import MemoryTracker

CONFIG = Config(
    "tiny", "mixtral", n_layer=2, n_head=4, n_embd=16, vocab_size=96, block_size=64, norm_class="RMSNorm",
    mlp_class="MoE", activation="silu", intermediate_size=12, n_expert=7, n_expert_per_token=3,
)  # fmt: skip
EXPERTS = lora.LoRAConfig(r=2, alpha=6, dropout=0.0, query=False, value=False, mlp=True)


def random_moe(config: Config) -> MoE:
    torch.manual_seed(0)
    layer = MoE(config, config.intermediate_size)
    torch.nn.init.normal_(layer.router.weight)
    layer.router.weight.data[2] = -layer.router.weight.data[3] * 50  # few tokens go to this expert
    return layer


def by_token(layer: MoE, x: torch.Tensor, k: int, norm_weights: bool) -> torch.Tensor:
    """Compute each token through its experts, one after the other."""
    outputs = []
    for token in x:
        probabilities = F.softmax(layer.router.weight @ token, dim=0)
        chosen = probabilities.argsort(descending=True)[:k]
        total = probabilities[chosen].sum() if norm_weights else 1.0
        y = 0
        for e in chosen:
            gate, up = (layer.gate_up.weight[e] @ token).chunk(2)
            y = y + probabilities[e] / total * (layer.proj.weight[e] @ (F.silu(gate) * up))
        outputs.append(y)
    return torch.stack(outputs)


@pytest.mark.parametrize("norm_weights", [True, False])
@pytest.mark.parametrize("tokens", [1, 9])
def test_equals_the_plain_formula(tokens, norm_weights):
    """Compare outputs and all gradients; with one token most experts have no rows."""
    layer = random_moe(replace(CONFIG, norm_expert_weights=norm_weights))
    x, direction = torch.randn(2, tokens, 16)
    results = []
    for f in (lambda x: layer(x[None])[0], lambda x: by_token(layer, x, 3, norm_weights)):
        layer.zero_grad()
        leaf = x.clone().requires_grad_()
        y = f(leaf)
        y.backward(direction)
        results.append([y.detach(), leaf.grad, *(p.grad for p in layer.parameters())])
    assert all(off(actual, expected) < 1e-5 for actual, expected in zip(*results, strict=True))


def test_gradients_of_the_product():
    x, weight = torch.randn(5, 3).double().requires_grad_(), torch.randn(4, 2, 3).double().requires_grad_()
    groups = moe.Groups(torch.tensor([1, 1, 1, 3, 3]), 4)
    assert gradcheck(lambda x, weight: moe.grouped_product(x, weight, groups), (x, weight))


@pytest.mark.parametrize("sizes", [(16, 24), (12, 16), (8, 2), (3, 5)])
@pytest.mark.parametrize("experts", [[0, 0, 0, 2, 2, 5], [3] * 7, [0, 1, 2, 3, 4, 5]])
def test_one_kernel_gives_what_a_loop_over_experts_gives(sizes, experts):
    """As on CUDA, in bfloat16, with its gradients, which are 0 for experts without rows."""
    groups = moe.Groups(torch.tensor(experts), 6)
    assert groups.ends.diff(prepend=torch.zeros(1)).tolist() == groups.counts
    x, weight = torch.randn(len(experts), sizes[0]), torch.randn(6, sizes[1], sizes[0])
    wide = torch.randn(len(experts), 8 + sizes[1]).bfloat16()
    results = []
    for simulate in (False, True):
        leaves = [leaf.bfloat16().requires_grad_() for leaf in (x, weight)]
        with use_policy(simulate_cuda=simulate, widen=False):
            y = moe.grouped_product(*leaves, groups)
            torch.cat((y, wide[:, :8]), dim=1).mul(wide).sum().backward()  # a gradient with gaps between its rows
        results.append([y.detach(), *(leaf.grad for leaf in leaves)])
    assert all(off(actual.float(), expected.float()) < 0.01 for actual, expected in zip(*results, strict=True))
    without = [e for e, count in enumerate(groups.counts) if count == 0]
    assert all((weight_grad[without] == 0).all() for *_, weight_grad in results)


@pytest.mark.parametrize("method", [None, EXPERTS, replace(EXPERTS, r=8)])
def test_a_layer_as_on_cuda_is_the_layer(method):
    """With biases, without LoRA, and with it."""
    gpt = GPT(replace(CONFIG, n_layer=1, intermediate_size=24, expert_bias=True)).bfloat16()
    gpt = lora.attach(gpt, method).eval() if method else gpt
    for name, parameter in gpt.h[0].mlp.named_parameters():
        torch.nn.init.normal_(parameter.requires_grad_(not name.startswith("router")), std=0.3)
    x, direction = torch.randn(2, 1, 9, 16).bfloat16()
    results = []
    for simulate in (False, True):
        with use_policy(simulate_cuda=simulate, widen=False):
            gpt.zero_grad()
            y = gpt.h[0].mlp(x)
            y.backward(direction)
        results.append([y.detach(), *(p.grad for p in gpt.h[0].mlp.parameters() if p.requires_grad)])
    assert len(results[0]) == (9 if method else 5)
    assert all(off(actual.float(), expected.float()) < 0.02 for actual, expected in zip(*results, strict=True))


def test_each_rows_scale_as_on_cuda():
    groups = moe.Groups(torch.tensor([0, 2, 2, 5, 5, 5]), 7)
    leaves = [torch.randn(n, 12).requires_grad_() for n in (6, 7, 7)]
    results = []
    for simulate in (False, True):
        with use_policy(simulate_cuda=simulate):
            y = moe.scaled_by_expert(*leaves, groups)
            results.append([y.detach(), *torch.autograd.grad(y.square().sum(), leaves)])
    assert all(off(actual, expected) < 1e-6 for actual, expected in zip(*results, strict=True))
    with FakeTensorMode(), use_policy(simulate_cuda=True):  # where a wait is an error
        fake = moe.Groups(torch.empty(6, dtype=torch.int64), 7)
        moe.scaled_by_expert(torch.empty(6, 12), *(torch.empty(7, 12) for _ in range(2)), fake)


def products_of_a_step(n_expert: int, dtype: torch.dtype = torch.bfloat16) -> int:
    """Count the matrix products of a step of LoRA on experts with biases, as on CUDA, where no tensor has contents."""
    config = replace(CONFIG, n_expert=n_expert, expert_bias=True)
    with on_meta():
        model = lora.attach(GPT(config).to(dtype), replace(EXPERTS, dropout=0.1)).train()
    with FakeTensorMode(), use_policy(simulate_cuda=True):
        materialize(model)
        model.h[0].mlp.gate_up.linear.bias.requires_grad_()
        x = torch.randn(1, 9, 16, dtype=dtype, requires_grad=True)
        with Counting() as counting:
            model.h[0].mlp(x).sum().backward()
    return counting.trace.products


def test_the_host_never_waits_to_learn_which_experts_are_chosen():
    """There are as many products however many experts there are; other dtypes than bfloat16 go by a loop."""
    assert products_of_a_step(7) == products_of_a_step(70)
    with pytest.raises(DynamicOutputShapeException):
        products_of_a_step(7, torch.float32)


@pytest.mark.parametrize("sizes", [(16, 24), (12, 16), (64, 2), (2, 48), (576, 64), (0, 8)])
@pytest.mark.parametrize("rows", [6, 7, 40, 333])
def test_where_other_rows_go_changes_no_bit(rows, sizes):
    """Of a row's product, and of its gradient."""
    own, n_expert = torch.randint(7, (rows // 3,)), 7
    x, weight, grads = torch.randn(rows, sizes[0]), torch.randn(n_expert, *sizes[::-1]), torch.randn(rows, sizes[1])
    results = []
    for _ in range(5):
        x[len(own) :].normal_()  # other rows, which go elsewhere too
        experts = torch.cat((own, torch.randint(7, (rows - len(own),))))
        routes, leaf = moe.Routing.from_topk(experts.unsqueeze(1), n_expert), x.clone().requires_grad_()
        y = moe.grouped_product(routes.dispatch(leaf), weight, routes.groups)[routes.places]
        y.backward(grads)
        results.append(torch.cat((y.detach()[: len(own)], leaf.grad[: len(own)]), dim=1))
    assert all(torch.equal(result, results[0]) for result in results)


def test_each_expert_has_an_update_of_its_own():
    """With LoRA the layer is that of weights to which each expert's own B A is added; the router keeps its choice."""
    gpt = GPT(CONFIG)
    gpt.h[0].mlp = random_moe(CONFIG)
    x = torch.randn(1, 9, 16)
    plain = gpt.h[0].mlp(x)
    layer = lora.attach(gpt, EXPERTS).eval().h[0].mlp
    assert torch.equal(layer(x), plain)
    assert {name for name, p in layer.named_parameters() if p.requires_grad} == {
        f"{name}.lora_{x}" for name in ("gate_up", "proj") for x in "AB"
    }
    changed = random_moe(CONFIG)
    for name in ("gate_up", "proj"):
        update = getattr(layer, name)
        torch.nn.init.normal_(update.lora_B)
        weight = getattr(changed, name).weight.data
        for e in range(7):
            A = update.lora_A[e].split(2)
            B = update.lora_B[e].chunk(len(A))
            weight[e] += 3.0 * torch.cat([b @ a for a, b in zip(A, B, strict=True)])
    assert off(layer(x), plain) > 0.1 and off(layer(x), changed(x)) < 1e-5
    assert all((a.std(dim=(-2, -1)) > 0.05).all() for a in (layer.gate_up.lora_A, layer.proj.lora_A))


def test_each_expert_has_a_scale_of_its_own():
    gpt = GPT(CONFIG)
    gpt.h[0].mlp = random_moe(CONFIG)
    layer = adapter_v2.attach(gpt, adapter_v2.AdapterConfig(start_layer=1)).h[0].mlp
    torch.nn.init.normal_(layer.proj.scale)
    torch.nn.init.normal_(layer.proj.shift)
    x = torch.randn(6, 12)
    expert = torch.tensor([0, 2, 2, 5, 5, 5])
    plain = torch.stack([layer.proj.linear.weight[e] @ row for e, row in zip(expert, x, strict=True)])
    routes = moe.Routing(expert, expert, moe.Groups(expert, 7), 1)
    assert off(layer.proj(x, routes), layer.proj.scale[expert] * (plain + layer.proj.shift[expert])) < 1e-6
    assert isinstance(layer.router, moe.Router)


@pytest.mark.parametrize("method", ["lora", "full"])
def test_the_plan_counts_what_a_step_holds(method):
    """Whatever the router chooses, there are as many rows."""
    config = replace(CONFIG, n_embd=64, intermediate_size=128, vocab_size=300, padded_vocab_size=300, head_size=16)
    experts = {"lora_mlp": "true"} if method == "lora" else {}
    planner, row = planner_of(config, method, precision="bf16", **experts), [40, 30, 20]
    method, plan = planner.method, planner.simulate(config, (row, 50), "none")
    segments, idx = Segments.of(row), torch.randint(300, (1, sum(row)))
    targets = Targets(torch.arange(50), torch.randint(300, (50,)))
    with MemoryTracker() as live:
        model = GPT(config)
        model = method.attach(model.to(method.weight_dtype("bf16"))).train()
        held = live.now
        live.peak = live.now
        with method.autocast("bf16", "cpu"):
            loss = model(idx, segments=segments, targets=targets)
        loss.backward()
    step = max(plan.forward, plan.backward_begins, plan.backward_ends) - plan.weights - plan.optimizer
    assert live.peak - held == pytest.approx(step, rel=0.02)
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in model.parameters() if p.requires_grad)


def test_names_in_the_files_of_mixtral(tmp_path):
    """Mixtral's files on the hub have a tensor for each projection of each expert."""
    tiny_hf_model("mixtral", "mixtral").save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    prefix = "model.layers.1.block_sparse_moe."
    assert {f"{prefix}experts.4.{name}.weight" for name in ("w1", "w2", "w3")} | {
        f"{prefix}gate.weight"
    } <= stored.keys()


@pytest.mark.subprocess
def test_two_ranks_share_the_experts(cli, llama, flags, tmp_path):
    """Five experts do not divide, and each rank's tokens go to others; FSDP trains as one process does."""
    base = tmp_path / "mixtral"
    tiny_hf_model("mixtral", "mixtral", vocab_size=320, max_position_embeddings=256).save_pretrained(base)
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copyfile(llama / name, base / name)
    hf.convert(base, hf_shards.StoredWeights(base))
    flags = of_method(flags, "lora") | {"checkpoint_dir": base}
    flags |= {"max_steps": 3, "batch_size": 10, "micro_batch_size": 5, "save_interval": 100, "lora_dropout": 0.0}
    assert cli("finetune/lora.py", **flags).code == 0
    two = flags | {"out_dir": tmp_path / "two", "devices": 2, "strategy": "fsdp"}
    result = run_process("finetune/lora.py", **two)
    assert result.code == 0, result
    same_run(flags["out_dir"], two["out_dir"], "lora")
