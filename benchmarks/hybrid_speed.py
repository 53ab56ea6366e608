"""A hybrid of Qwen 3.5's shape against transformers' own torch code: a training step, and decoding, in one run.

    python benchmarks/hybrid_speed.py

Both have the same random weights in float32, all of which train. The two take turns, so that a busy machine slows both;
the ratios are of the medians. Losses and greedy tokens are compared too.
"""

import statistics
import tempfile
import time
from pathlib import Path

from lit_gpt.cli import PositiveInt, run

n_layer: PositiveInt = 4  # three gated delta nets, then attention, and so on
n_embd: PositiveInt = 768
vocabulary: PositiveInt = 65536
tokens: PositiveInt = 512  # of the sample that a step takes
prompt: PositiveInt = 128
new_tokens: PositiveInt = 64
rounds: PositiveInt = 5


def main() -> None:
    import torch

    torch.manual_seed(0)
    theirs, ours = models()
    idx = torch.randint(vocabulary, (1, tokens))
    print(f"{sum(p.numel() for p in ours.parameters()):,} parameters, {torch.get_num_threads()} threads")
    compare("a training step", lambda: their_step(theirs, idx), lambda: our_step(ours, idx))
    theirs.eval(), ours.eval()
    start = idx[:, :prompt]
    compare(f"{new_tokens} tokens", lambda: their_answer(theirs, start), lambda: our_answer(ours, start))


def models():
    """The same random model in transformers and here, in training mode."""
    from transformers import AutoModelForCausalLM, Qwen3_5TextConfig

    from lit_gpt import load_model
    from lit_gpt.conversion import hf, hf_shards

    config = Qwen3_5TextConfig(
        vocab_size=vocabulary, hidden_size=n_embd, intermediate_size=3 * n_embd, num_hidden_layers=n_layer,
        num_attention_heads=n_embd // 128, num_key_value_heads=max(1, n_embd // 384), head_dim=128,
        linear_num_key_heads=n_embd // 128, linear_num_value_heads=n_embd // 64, linear_key_head_dim=128,
        linear_value_head_dim=128, tie_word_embeddings=True,
    )  # fmt: skip
    theirs = AutoModelForCausalLM.from_config(config)
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        hf.convert(Path(folder), hf_shards.StoredWeights(Path(folder)))
        ours = load_model(Path(folder))
        state = {name: tensor.clone() for name, tensor in ours.state_dict().items()}  # not mapped from the file
    ours.load_state_dict(state, assign=True)
    ours.tie_weights()
    return theirs.train(), ours.train().requires_grad_()


def their_step(model, idx) -> float:
    model.zero_grad()
    loss = model(idx, labels=idx).loss
    loss.backward()
    return loss.item()


def our_step(model, idx) -> float:
    import torch

    from lit_gpt.model.inputs import Segments, Targets

    model.zero_grad()
    n = idx.size(1) - 1
    targets = Targets(torch.arange(n), idx[0, 1:])
    loss = model(idx[:, :n], segments=Segments.of([n]), targets=targets) / n
    loss.backward()
    return loss.item()


def their_answer(model, idx) -> list[int]:
    import torch

    with torch.no_grad():
        out = model.generate(idx, max_new_tokens=new_tokens, do_sample=False, eos_token_id=None, pad_token_id=0)
    return out[0, idx.size(1) :].tolist()


def our_answer(model, idx) -> list[int]:
    from lit_gpt.generation.engine import generate
    from lit_gpt.generation.steps import FastStep

    return list(generate(model, idx[0].tolist(), new_tokens, temperature=0, step=FastStep(model)))


def compare(what: str, their, our) -> None:
    """Time both in turns and print the medians; what they return must be the same but for rounding."""
    expected, found = their(), our()  # the first of each is not timed
    if isinstance(found, float):
        print(f"{what}: losses {expected:.5f} and {found:.5f}")
    else:
        print(f"{what}: {sum(a == b for a, b in zip(expected, found, strict=True))} of {len(found)} the same")
    seconds: dict[str, list[float]] = {"transformers": [], "ours": []}
    for _ in range(rounds):
        for name, function in (("transformers", their), ("ours", our)):
            begin = time.perf_counter()
            function()
            seconds[name].append(time.perf_counter() - begin)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    ratio = medians["transformers"] / medians["ours"]
    print(f"  transformers {medians['transformers']:.3f} s, ours {medians['ours']:.3f} s: {ratio:.2f} times as fast")


if __name__ == "__main__":
    run(main)
