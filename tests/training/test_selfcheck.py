"""scripts/check.py: all is well on every family's tiny model, and ten sabotages are each found and named."""

import json
import shutil
from dataclasses import asdict, replace

import pytest
import torch

from helpers.methods import EVERYTHING, STYLE, attach_fresh
from helpers.rows import write_rows
from helpers.runs import parse_flags
from helpers.tiny_models import LAYOUTS, THOROUGH, tiny_hf_model
from lit_gpt.checkpoints.base_model import BaseCheckpoint
from lit_gpt.conversion import hf, hf_shards
from lit_gpt.data import packing
from lit_gpt.data.args import ColumnArgs, PrepareArgs
from lit_gpt.data.prepare import prepare
from lit_gpt.generation.steps import native as native_step
from lit_gpt.kernels import build, functional
from lit_gpt.methods import finetuned_file, lora
from lit_gpt.methods.lora import LoRA, LoRALinear
from lit_gpt.model.kv_cache import AttentionCache
from lit_gpt.model.packed_inputs import Segments
from lit_gpt.training import objectives
from lit_gpt.training.selfcheck.finding import failures
from lit_gpt.training.setup import check

needs_kernels = pytest.mark.skipif(build.library("layers") is None, reason="needs a C++ compiler")


@pytest.fixture
def run_flags(llama, data_dir, tmp_path) -> dict:
    return {"checkpoint_dir": llama, "data_dir": data_dir, "out_dir": tmp_path / "out", "lora_mlp": "true"}


def found(flags: dict, method: str = "lora") -> list:
    made, args = parse_flags(method, **flags)
    return list(check(args, made, BaseCheckpoint.open(args.paths.checkpoint_dir, args.memory.quantize)))


@pytest.mark.parametrize("method", ["lora", "adapter", "adapter_v2", "ia3", "full"])
def test_all_is_well(run_flags, method):
    if method != "lora":
        del run_flags["lora_mlp"]
    findings = found(run_flags | ({"adapter_start_layer": 1} if "adapter" in method else {}), method)
    assert not failures(findings), [finding.text() for finding in findings]
    assert [finding.name for finding in findings] == [
        "labels", "answers", "tokens", "template", "fresh", "packed", "trains", "cut", "kernels", "cached", "merge"
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("family", "layout"),
    [pytest.param(*at, marks=[] if at[0] in THOROUGH else pytest.mark.slow) for at in dict(LAYOUTS).items()],
)
def test_all_is_well_in_every_family(run_flags, llama, tmp_path, family, layout):
    base = tmp_path / "base"
    tiny_hf_model(family, layout, vocab_size=320, max_position_embeddings=256).save_pretrained(base)
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):  # what the data is prepared with
        shutil.copyfile(llama / name, base / name)
    hf.convert(base, hf_shards.StoredWeights(base))
    findings = found(run_flags | {"checkpoint_dir": base})
    assert not failures(findings), [finding.text() for finding in findings]


# --- ten sabotages


def leak(patch):
    """Samples see those before them in the row."""

    def of(lengths, samples):
        right = Segments.of(lengths, samples=samples)
        offsets = torch.tensor([0, sum(lengths)], dtype=torch.int32)
        return Segments((sum(lengths),), offsets, right.positions, right.samples)

    patch.setattr(packing, "Segments", type("Leaky", (), {"of": staticmethod(of)}))


def shifted_labels(patch):
    """Each token learns to predict itself."""

    def shifted(samples):
        row = packing.pack(samples)
        own = row.idx[0, row.targets.positions]
        return replace(row, targets=replace(row.targets, labels=own))

    patch.setattr(objectives, "pack", shifted)


def frozen_adapter(patch):
    """A matrix of an update does not train."""
    attach = LoRA.attach
    patch.setattr(LoRA, "attach", lambda self, model: freeze(attach(self, model)))


def freeze(model):
    next(iter(lora.lora_layers(model).values())).lora_A.requires_grad_(False)
    return model


def unfrozen_base(patch):
    """A norm of the base trains, too."""

    def attach_and_unfreeze(self, model, attach=LoRA.attach):
        attach(self, model).ln_f.weight.requires_grad_(True)
        return model

    patch.setattr(LoRA, "attach", attach_and_unfreeze)


def wrong_scale_at_merge(patch):
    """Merging adds twice the update."""
    merged = LoRALinear.merged

    def twice(self, dtype=None):
        return 2 * merged(self, dtype) - self.linear.weight

    patch.setattr(LoRALinear, "merged", twice)


def stale_weights(patch):
    """The fast decoding step does not see that weights have changed."""
    patch.setattr(native_step, "changed", lambda before, now: False)


def stale_cache(patch):
    """The last of several new keys is not stored."""
    append = AttentionCache.append

    def forgetful(self, k, v):
        k = torch.cat([k[:, :, :-1], torch.zeros_like(k[:, :, -1:])], dim=2) if k.size(2) > 1 else k
        return append(self, k, v)

    patch.setattr(AttentionCache, "append", forgetful)


def kernel_off(patch):
    """A kernel's results are a thousandth too large."""
    gated = functional.ops.gated
    patch.setattr(functional.ops, "gated", lambda *arguments: gated(*arguments) * 1.001)


def mean_over_rows(patch):
    """The loss of a row is the mean of its own tokens."""
    loss = objectives.SupervisedFinetuning.loss

    def mean(self, model, row):
        return loss(self, model, row) / len(row.targets.labels)

    patch.setattr(objectives.SupervisedFinetuning, "loss", mean)


@pytest.mark.parametrize(
    ("sabotage", "named", "says"),
    [
        (leak, "packed", "alone"),
        (shifted_labels, "labels", "are not"),
        (frozen_adapter, "trains", "none: h.0.attn.qkv.lora_A"),
        (unfrozen_base, "trains", "too many: ln_f.weight"),
        (wrong_scale_at_merge, "merge", "off by"),
        pytest.param(stale_weights, "cached", "off by", marks=needs_kernels),
        (stale_cache, "cached", "off by"),
        pytest.param(kernel_off, "kernels", "off by", marks=needs_kernels),
        (mean_over_rows, "cut", "off by"),
    ],
)
def test_a_sabotage_is_found_and_named(run_flags, monkeypatch, sabotage, named, says):
    sabotage(monkeypatch)
    findings = found(run_flags)
    assert failures(findings) == [named], [finding.text() for finding in findings]
    assert says in next(finding.says for finding in findings if finding.name == named)


def test_a_template_without_an_end_token_is_found(run_flags, llama, tmp_path):
    (tmp_path / "style.jinja").write_text("{% for m in messages %}{{ m.content }}\n{% endfor %}")
    args = PrepareArgs(checkpoint_dir=llama, prompt_style=str(tmp_path / "style.jinja"), validation_fraction=0.2)
    prepare(args, ColumnArgs(), tmp_path / "d", str(write_rows(tmp_path / "r.jsonl")))
    findings = found(run_flags | {"data_dir": tmp_path / "d"})
    assert failures(findings) == ["answers", "template"], [finding.text() for finding in findings]
    assert "answers would not end" in findings[3].says


@pytest.mark.parametrize("zeros", [False, True])
def test_a_finetuned_file_moves_the_logits(cli, run_flags, llama, tmp_path, zeros):
    """An adapter of zeros, such as one that was saved before it was trained, does not."""
    base = BaseCheckpoint.open(llama)
    model = attach_fresh(base.build(), "LoRA")
    state = finetuned_file.trained_state(model)
    for tensor in () if zeros else state.values():
        tensor.add_(torch.randn_like(tensor), alpha=0.1)
    record = {"hyperparameters": asdict(EVERYTHING), "prompt_style": STYLE}
    finetuned_file.save_file(tmp_path / "f.pth", "lora", base.fingerprint, state, **record)
    flags = {"checkpoint_dir": llama, "data_dir": run_flags["data_dir"], "finetuned_path": tmp_path / "f.pth"}
    result = cli("scripts/check.py", **flags, json="true")
    checks = json.loads(result.out)["checks"]
    assert checks["finetuned"]["passed"] is not zeros and (checks["finetuned"]["moved"] == 0) is zeros
    assert all(check["passed"] is not False for name, check in checks.items() if name != "finetuned")
    if zeros:
        result.refused("1 of 11 checks failed: finetuned")
    else:
        assert result.code == 0 and checks["merge"]["kept"] == pytest.approx(1, abs=1e-3)


def test_a_run_checks_itself_before_step_1(cli, flags, monkeypatch):
    flags |= {"max_steps": 2, "warmup_steps": 0, "check": "true"}
    result = cli("finetune/lora.py", **flags)
    assert result.code == 0 and "ok     packed" in result.out, result.err
    plain = cli("finetune/lora.py", **flags | {"check": "false", "out_dir": flags["out_dir"].with_name("plain")})
    assert plain.code == 0
    written = [(flags["out_dir"].with_name(name) / "metrics.csv").read_text().split()[1] for name in ("out", "plain")]
    assert written[0].split(",")[:4] == written[1].split(",")[:4]
    mean_over_rows(monkeypatch)
    again = flags | {"out_dir": flags["out_dir"].with_name("again")}
    cli("finetune/lora.py", **again).refused("1 of 11 checks failed: cut")
    assert not (again["out_dir"] / "metrics.csv").exists()
    cli("finetune/lora.py", **again, devices=2).refused("--check true", code=2)
