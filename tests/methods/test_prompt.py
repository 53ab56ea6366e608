"""Prompt tuning, P-tuning and prefix tuning: against PEFT, and as they train and answer."""

import peft
import pytest
import torch
from torch import nn

from helpers.compare import in_steps, off, tokens
from helpers.methods import PROMPTS, STYLE, as_if_trained, make
from helpers.native import native_logits
from helpers.runs import metrics, planner_of, weights_of
from helpers.tiny_models import Tiny, model_of, tiny_hf_model
from lit_gpt import GPT
from lit_gpt.checkpoints import folder
from lit_gpt.checkpoints.base_model import load_model
from lit_gpt.data import dataset, packing
from lit_gpt.errors import UsageError
from lit_gpt.families.registry import config_from_name
from lit_gpt.generation.engine import generate
from lit_gpt.generation.steps.native import NativeStep
from lit_gpt.kernels import build
from lit_gpt.methods import finetuned_file, finetuned_model
from lit_gpt.methods.method import Start
from lit_gpt.methods.prompt import prompt_of
from lit_gpt.model.gpt import quantize
from lit_gpt.model.packed_inputs import Targets

P = 5
# Grouped queries; shared norm and one key; learned positions; ALiBi; scaled embeddings and windows.
FEW = [("llama", "llama3"), ("falcon", "7b"), ("gpt2", "gpt2"), ("mpt", "mpt"), ("gemma", "gemma2")]


def converted(layout: tuple[str, str], place) -> Tiny:
    model_of(*layout, place)
    return Tiny(place, tiny_hf_model(*layout))


@pytest.fixture(scope="module", params=FEW, ids="-".join)
def layout(request, tmp_path_factory) -> Tiny:
    return converted(request.param, tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def llama_like(tmp_path_factory) -> Tiny:
    return converted(FEW[0], tmp_path_factory.mktemp("tiny"))


def fresh(tiny: Tiny, name: str, start: Start | None = None, **settings) -> GPT:
    torch.manual_seed(1)
    method, model = make(name, **settings), load_model(tiny.folder)
    method.attach(model)
    torch.manual_seed(2)
    method.initialize(model, start)
    return model.eval()


def behind(model: GPT, idx: torch.Tensor) -> torch.Tensor:
    """Return token ids behind the model's virtual ones."""
    return torch.cat((torch.tensor(model.virtual_tokens).expand(len(idx), -1), idx), dim=1)


@pytest.mark.parametrize("name", ["prompt tuning", "prefix tuning"])
@torch.no_grad()
def test_a_fresh_prompt_is_the_base_behind_the_tokens_that_it_starts_from(layout: Tiny, name: str):
    idx, own = tokens(layout.hf), [3, 1, 4]
    model = fresh(layout, name, Start(lambda text: own, lambda samples: None, 1), init="text", text="it")
    told = torch.cat((torch.tensor([3, 1, 4, 3, 1]).expand(len(idx), -1), idx), dim=1)
    assert off(model(behind(model, idx))[:, P:], load_model(layout.folder)(told)[:, P:]) < 1e-5


@pytest.mark.parametrize("name", PROMPTS)
def test_a_prompt_over_layouts(layout: Tiny, name: str):
    """What should train moves, all of it and nothing else; packed as alone; cached as not; read in one go and not."""
    model, idx = fresh(layout, name), tokens(layout.hf)
    before = {name: p.clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    row = packing.pack(
        [
            dataset.with_tokens_before(dataset.Sample(t[0].int(), torch.ones(t.size(1)).byte()), model.virtual_tokens)
            for t in (idx[:1], idx[1:, :9])
        ]
    )
    model.train()(row.idx, segments=row.segments, targets=row.targets).backward()
    optimizer.step()
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {name for name, p in model.named_parameters() if p.requires_grad}
    assert moved == finetuned_file.trained_state(model).keys()
    model.eval()
    with torch.no_grad():
        packed, at = model(row.idx, segments=row.segments), 0
        for length in row.segments.lengths:
            assert off(packed[:, at : at + length], model(row.idx[:, at : at + length])) < 1e-5
            at += length
        told = behind(model, idx)
        expected, cache = model(told), model.kv_cache(2, told.size(1))
        assert off(torch.cat([model(step, cache=cache) for step in in_steps(told)], dim=1), expected) < 1e-5
        assert off(expected[:, P:], load_model(layout.folder)(idx)) > 1e-3


@pytest.mark.parametrize("name", PROMPTS)
def test_save_and_load(llama_like: Tiny, tmp_path, name):
    model, idx = as_if_trained(fresh(llama_like, name)), tokens(llama_like.hf)
    base = folder.fingerprint(folder.load_state(llama_like.folder))
    record = {"hyperparameters": make(name).settings, "prompt_style": STYLE}
    finetuned_file.save_file(tmp_path / "f.pth", "prompt", base, finetuned_file.trained_state(model), **record)
    again, _ = finetuned_model.load_finetuned(llama_like.folder, tmp_path / "f.pth", "prompt")
    with torch.no_grad():
        assert torch.equal(again(behind(again, idx)), model(behind(model, idx)))


@pytest.mark.skipif(build.library("decode") is None, reason="needs a C++ compiler")
@pytest.mark.parametrize("format", [None, "nf4"])
@pytest.mark.parametrize("name", ["prompt tuning", "prefix tuning"])
def test_decoding_goes_by_the_fast_step(llama_like: Tiny, name, format):
    base = load_model(llama_like.folder)
    model, method = (quantize(base, format) if format else base), make(name)
    method.attach(model)
    method.initialize(model)
    told = behind(as_if_trained(model), tokens(llama_like.hf, rows=1, length=9))
    with torch.no_grad():
        logits = model(told)
        assert off(native_logits(NativeStep(model), model, told[0].tolist()), logits[0, -1]) < (
            1e-3 if format else 1e-5
        )
    prompt = told[0].tolist()
    answers = [
        list(generate(model, prompt, 8, temperature=0, repetition_penalty=1.3, step=step))
        for step in (NativeStep(model), None)
    ]
    assert answers[0] == answers[1]


# --- against PEFT


def peft_config(name: str, hf: nn.Module) -> peft.PeftConfig:
    place = {"num_virtual_tokens": P, "task_type": "CAUSAL_LM"}
    if name == "prompt tuning":
        return peft.PromptTuningConfig(**place)
    if name == "prefix tuning":
        return peft.PrefixTuningConfig(**place)
    kind = "LSTM" if "LSTM" in name else "MLP"
    return peft.PromptEncoderConfig(
        **place, encoder_reparameterization_type=kind, encoder_hidden_size=12, encoder_dropout=0.0
    )


def pairs(ours: nn.Module, theirs: nn.Module) -> list[tuple[nn.Parameter, nn.Parameter]]:
    """Return our parameters and PEFT's, which come in the same order."""
    return list(zip(ours.parameters(), theirs.parameters(), strict=True))


@pytest.mark.parametrize("name", ["prompt tuning", "P-tuning", "P-tuning by LSTM", "prefix tuning"])
def test_logits_and_gradients_equal_peft(llama_like: Tiny, name):
    model, hf = as_if_trained(fresh(llama_like, name)), tiny_hf_model(*FEW[0])
    theirs = peft.get_peft_model(hf, peft_config(name, hf)).eval()
    ours, encoder = prompt_of(model), theirs.prompt_encoder["default"]
    if name == "P-tuning by LSTM":
        encoder.encoder_num_layers = 2
    for mine, other in pairs(ours, encoder):
        other.data.copy_(mine.data)
    idx = tokens(llama_like.hf, rows=1)
    logits = theirs(idx).logits[:, 0 if "prefix" in name else P :]
    assert off(model(behind(model, idx))[:, P:], logits) < 1e-5
    n = idx.size(1) - 1
    loss = model(behind(model, idx), targets=Targets(torch.arange(n) + P, idx[0, 1:])) / n
    for each in (loss, nn.functional.cross_entropy(logits[0, :-1], idx[0, 1:])):
        each.backward()
    for mine, other in pairs(ours, encoder):
        assert off(mine.grad, other.grad) < 1e-5


# --- sizes, and what cannot be


@pytest.mark.parametrize(
    ("settings", "expected"), [({}, 90_880), ({"kind": "keys_values"}, 81_920)], ids=["prompt", "prefix"]
)
def test_trainable_parameters_of_falcon_7b(settings, expected):
    with torch.device("meta"):
        model = make("prompt tuning", length=20, **settings).attach(GPT(config_from_name("falcon-7b")))
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == expected


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"prompt_length": 100_000}, ["--prompt_length 100000", "context", "give fewer"]),
        ({"prompt_kind": "keys_values", "prompt_encoder": "lstm"}, ["--prompt_kind keys_values", "none or mlp"]),
        ({"prompt_encoder": "mlp", "prompt_init": "vocabulary"}, ["--prompt_encoder mlp with --prompt_init"]),
        ({"prompt_text": "a"}, ["--prompt_text", "--prompt_init text"]),
        ({"prompt_hidden": 5}, ["--prompt_hidden 5", "encoder"]),
    ],
    ids=str,
)
def test_what_cannot_be_is_refused_in_one_line(cli, flags, change, words):
    flags = {k: v for k, v in flags.items() if not k.startswith("lora")}
    cli("finetune/prompt.py", **flags | change).refused(*words, code=2)
    assert not flags["out_dir"].exists()


def test_layers_without_keys_are_refused():
    with torch.device("meta"):
        base = GPT(config_from_name("falcon-mamba-7b"))
    with pytest.raises(UsageError, match="--prompt_kind keys_values: .* expected embeddings"):
        make("prefix tuning").attach(base)


# --- runs


@pytest.mark.parametrize(
    "settings",
    [
        {"kind": "keys_values", "activation_checkpointing": "full"},
        pytest.param({"encoder": "mlp", "init": "random"}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_a_resumed_run_ends_with_the_same_bits_and_answers(cli, flags, settings):
    flags = {k: v for k, v in flags.items() if not k.startswith("lora")} | {"learning_rate": 0.05, "max_steps": 6}
    flags |= {name if name.startswith("activation") else f"prompt_{name}": value for name, value in settings.items()}
    result = cli("finetune/prompt.py", **flags)
    assert result.code == 0, result.err
    whole, rows = weights_of(flags["out_dir"], "prompt"), metrics(flags["out_dir"])
    assert float(rows[-1]["val_loss"]) < float(rows[0]["val_loss"])
    path = flags["out_dir"] / "lit_model_prompt_finetuned.pth"
    path.unlink()
    max((flags["out_dir"] / "state").iterdir()).unlink()
    result = cli("finetune/prompt.py", **flags | {"resume": "auto"})
    assert result.code == 0 and "resumed after step" in result.out, result.err
    assert all(torch.equal(tensor, whole[name]) for name, tensor in weights_of(flags["out_dir"], "prompt").items())
    place = {"checkpoint_dir": flags["checkpoint_dir"], "finetuned_path": path}
    result = cli("generate/finetuned.py", **place, prompt="describe the cat 1", temperature=0, max_new_tokens=5)
    assert result.code == 0 and "tokens" in result.err, result.err
    cli("generate/lora.py", **place, prompt="a").refused("trained by the method prompt", "expected lora")


def test_the_plan_counts_the_virtual_tokens():
    config = config_from_name("pythia-70m")
    planner = planner_of(config, "prompt", prompt_length=50, micro_batch_size=1, max_seq_length=100)
    assert planner.worst_row() == ([150], 150)
    plan = planner.plan(([150], 100), "none")
    assert plan.trainable == 50 * config.n_embd and plan.peak > plan.weights
