"""Speed of a hybrid of gated delta nets and attention against transformers' fallback in torch, as ratios of one run.

    python benchmarks/hybrid_speed.py
    python benchmarks/hybrid_speed.py --hidden_size 64 --samples 2 --sample_tokens 70 --new_tokens 8 --rounds 2

A model of Qwen 3.5's shape with random weights: three layers of gated delta nets and one of attention,
107 million parameters. Both train all of them on the same samples by fused AdamW, ours in one packed row, transformers
in a batch without padding, and both continue the same prompt greedily. They take turns, round by round, so that both
meet the same state of the machine; the first losses must be equal. Writes hybrid_speed_cpu_fp32.json and .md, or
whatever the device and the precision are.
"""

import json
import tempfile
from collections.abc import Callable
from datetime import date
from pathlib import Path
from statistics import median
from typing import Any, Literal

from lit_gpt.cli import PositiveInt, run
from lit_gpt.errors import UserError

precision: Literal["fp32", "bf16"] = "fp32"  # of weights and arithmetic
hidden_size: PositiveInt = 1024  # width; all other sizes follow from it
vocabulary: PositiveInt = 32768  # tokens
samples: PositiveInt = 4  # samples of a training step
sample_tokens: PositiveInt = 256  # tokens of each
prompt_tokens: PositiveInt = 64  # tokens of the prompt
new_tokens: PositiveInt = 64  # tokens of the answer
rounds: PositiveInt = 7  # steps and answers of each that count; one before them does not
seed: PositiveInt = 1337  # of weights and tokens
out_dir: Path = Path("benchmarks/results")  # folder for the results

TITLES = {"train": "training step", "decode": "decoding"}
TOLERANCES = {"fp32": 1e-4, "bf16": 0.05}  # of the first losses


def main() -> None:
    import torch
    from peers import report

    device = "cuda" if torch.cuda.is_available() else "cpu"
    with tempfile.TemporaryDirectory() as folder:
        ours, theirs = models(Path(folder), device)
    parameters = sum(p.numel() for p in ours.parameters())
    tokens = torch.randint(3, vocabulary, (samples, sample_tokens + 1), device=device)
    prompt = torch.randint(3, vocabulary, (prompt_tokens,), device=device)
    work = {
        "train": {"ours": our_step(ours, tokens), "transformers": their_step(theirs, tokens)},
        "decode": {"ours": our_answer(ours, prompt), "transformers": their_answer(theirs, prompt)},
    }
    results: dict[str, Any] = {
        "command": report.command("hybrid_speed"),
        "date": date.today().isoformat(),
        "machine": report.machine(torch.get_num_threads()),
        "versions": versions(),
        "precision": precision,
        "parameters": parameters,
        "tokens": {"train": samples * sample_tokens, "decode": new_tokens},
        **{what: race(what, each) for what, each in work.items()},
    }
    write(results, out_dir / f"hybrid_speed_{device}_{precision}", report.where(results))


def models(folder: Path, device: str) -> tuple[Any, Any]:
    """Return our model and transformers' one, of the same random weights."""
    import torch
    from transformers import Qwen3_5ForCausalLM, Qwen3_5TextConfig

    from lit_gpt.checkpoints.base_model import load_model
    from lit_gpt.conversion import hf, hf_shards

    head = hidden_size // 8
    config = Qwen3_5TextConfig(
        vocab_size=vocabulary, hidden_size=hidden_size, intermediate_size=3 * hidden_size, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=1, head_dim=2 * head, linear_num_key_heads=16,
        linear_num_value_heads=16, linear_key_head_dim=head, linear_value_head_dim=head, tie_word_embeddings=True,
        max_position_embeddings=4096, eos_token_id=0, bos_token_id=1, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(seed)
    theirs = Qwen3_5ForCausalLM(config).to(device)
    theirs.save_pretrained(folder)
    hf.convert(folder, hf_shards.StoredWeights(folder))
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    return load_model(folder, dtype, device).requires_grad_(), theirs.to(dtype)


def our_step(model: Any, tokens: Any) -> Callable[[], float]:
    """Return what takes an optimizer step on a packed row and returns the loss."""
    import torch

    from lit_gpt.model.packed_inputs import Segments, Targets

    n, length = tokens.size(0), tokens.size(1) - 1
    row, segments = tokens[:, :-1].reshape(1, -1), Segments.of([length] * n, tokens.device)
    targets = Targets(torch.arange(n * length, device=tokens.device), tokens[:, 1:].reshape(-1))
    return stepping(model, lambda: model(row, segments, targets=targets) / (n * length))


def their_step(model: Any, tokens: Any) -> Callable[[], float]:
    """Return what takes an optimizer step on a batch and returns the loss."""
    import torch.nn.functional as F

    ids, labels = tokens[:, :-1], tokens[:, 1:].reshape(-1)
    return stepping(model, lambda: F.cross_entropy(model(ids, use_cache=False).logits.flatten(0, 1), labels))


def stepping(model: Any, loss_of: Callable[[], Any]) -> Callable[[], float]:
    import torch

    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step() -> float:
        model.train()
        loss = loss_of()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


def our_answer(model: Any, prompt: Any) -> Callable[[], float]:
    """Return what continues the prompt greedily and returns the sum of the new ids."""
    from lit_gpt.generation.engine import generate
    from lit_gpt.generation.steps import FastStep

    step = FastStep(model)  # as generate/ takes

    def answer() -> float:
        model.eval()
        return float(sum(generate(model, prompt.tolist(), new_tokens, temperature=0, step=step)))

    return answer


def their_answer(model: Any, prompt: Any) -> Callable[[], float]:
    """Return what continues the prompt greedily and returns the sum of the new ids."""

    def answer() -> float:
        model.eval()
        length = dict(min_new_tokens=new_tokens, max_new_tokens=new_tokens)
        ids = model.generate(prompt[None], do_sample=False, **length)[0, len(prompt) :]
        return float(ids.sum())

    return answer


def race(what: str, contestants: dict[str, Callable[[], float]]) -> dict[str, Any]:
    """Let each work once in turn; return the seconds of each round, and how much faster ours are.

    Raises:
        UserError: the first round's losses differ.
    """
    from peers.turns import take_turns

    def check(found: dict[str, float]) -> None:
        if what == "train" and abs(found["ours"] - found["transformers"]) > TOLERANCES[precision]:
            raise UserError(f"the losses differ: {found}; the contestants do not the same work")

    measured = take_turns(TITLES[what], contestants, rounds, check)
    ratios = [theirs / ours for ours, theirs in zip(measured["ours"], measured["transformers"], strict=True)]
    return {"seconds": measured, "times_as_fast": median(ratios), "least": min(ratios), "most": max(ratios)}


def versions() -> dict[str, str]:
    import platform

    import torch
    import transformers

    return {"torch": torch.__version__, "transformers": transformers.__version__, "Python": platform.python_version()}


def write(results: dict[str, Any], stem: Path, where: str) -> None:
    """Write the figures as JSON and as a table."""
    from lit_gpt.files import atomic

    size = f"{results['parameters'] / 1e6:.0f} million parameters in {results['precision']}"
    lines = [
        f"# A hybrid of Qwen 3.5's shape, {size}\n",
        f"`{results['command']}` on {where} Transformers computes gated delta nets by its own fallback in torch; "
        f"medians of {rounds} rounds, in which both take turns.\n",
        "| | Lit-GPT tokens/s | transformers tokens/s | times as fast | from round to round |",
        "|---|---:|---:|---:|---:|",
    ]
    for what, title in TITLES.items():
        rates = [results["tokens"][what] / median(times) for times in results[what]["seconds"].values()]
        spread = f"{results[what]['least']:.2f} to {results[what]['most']:.2f}"
        fields = [title, *(f"{rate:.1f}" for rate in rates), f"{results[what]['times_as_fast']:.2f}", spread]
        lines.append("| " + " | ".join(fields) + " |")
    for suffix, text in ((".json", json.dumps(results, indent=2)), (".md", "\n".join(lines))):
        with atomic(stem.with_suffix(suffix)) as temporary:
            temporary.write_text(text + "\n", encoding="utf-8")
    print("\n".join(lines[2:]))


if __name__ == "__main__":
    run(main)
