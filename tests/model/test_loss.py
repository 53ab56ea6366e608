"""The loss is the mean over the supervised tokens of the global batch, however it is cut into rows; and packed samples
do not see each other."""

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from helpers.compare import off
from helpers.tiny_models import Tiny
from lit_gpt import GPT
from lit_gpt.checkpoints.base_model import load_model
from lit_gpt.data import dataset, packing
from lit_gpt.kernels.policy import use_policy
from lit_gpt.methods import lora
from lit_gpt.model.loss import summed_cross_entropy

EVERYTHING = lora.LoRAConfig(r=4, dropout=0.0, key=True, projection=True, mlp=True, head=True)


def ragged(n: int = 8) -> list[dataset.Sample]:
    """Return samples of 4 to 30 tokens; the first third of each is not supervised, of one only the last token is."""
    generator = torch.Generator().manual_seed(0)
    samples = []
    for i in range(n):
        length = int(torch.randint(4, 31, (), generator=generator))
        tokens = torch.randint(96, (length,), generator=generator, dtype=torch.int32)
        supervised = (torch.arange(length) >= (length - 1 if i == 2 else length // 3)).to(torch.uint8)
        samples.append(dataset.Sample(tokens, supervised))
    return samples


def gradients(model: GPT, rows: list[packing.PackedRow], count: int) -> list[torch.Tensor]:
    model.train().zero_grad()
    for row in rows:
        (model(row.idx, segments=row.segments, targets=row.targets) / count).backward()
    return [p.grad.clone() for p in model.parameters() if p.requires_grad]


def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return all(off(x, y) < 1e-5 for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("method", ["lora", "full"])
def test_gradient_does_not_depend_on_the_cut(tiny: Tiny, method):
    model = load_model(tiny.folder)
    if method == "lora":
        torch.manual_seed(0)
        lora.attach(model, EVERYTHING)
        for layer in lora.lora_layers(model).values():
            torch.nn.init.normal_(layer.lora_B, std=0.1)
    samples = ragged()
    count = packing.supervised_count(samples)
    whole = gradients(model, [packing.pack(samples)], count)
    assert same(gradients(model, [packing.pack([s]) for s in samples], count), whole)
    assert same(gradients(model, [packing.pack(samples[i : i + 2]) for i in (0, 2, 4, 6)], count), whole)


def test_gradient_equals_transformers_on_a_padded_batch(tiny: Tiny, tmp_path):
    """The table maps transformers' gradients to ours as it maps the weights."""
    from lit_gpt.conversion import weights

    samples = ragged()
    count = packing.supervised_count(samples)
    longest = max(len(s.tokens) for s in samples)
    idx, labels = torch.zeros(2, len(samples), longest, dtype=torch.long)
    labels -= 100
    for i, s in enumerate(samples):
        idx[i, : len(s.tokens)] = s.tokens
        labels[i, : len(s.tokens)] = torch.where(s.supervised == 1, s.tokens.long(), -100)
    logits = tiny.hf(
        idx, attention_mask=(torch.arange(longest) < torch.tensor([[len(s.tokens)] for s in samples])).long()
    )
    loss = F.cross_entropy(logits.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum") / count
    loss.backward()

    model = load_model(tiny.folder)
    model.requires_grad_(True)
    row = packing.pack(samples)
    ours = model(row.idx, segments=row.segments, targets=row.targets) / count
    ours.backward()
    assert off(ours.detach(), loss.detach()) < 1e-5
    for p in tiny.hf.parameters():
        p.data = p.grad
    tiny.hf.save_pretrained(tmp_path)  # under the names of the files, which are not always those of the modules
    expected = dict(weights.to_lit(weights.rows(model.config), load_file(tmp_path / "model.safetensors")))
    # of these transformers has a small difference of large sums, which is further from float64 than ours
    decays = "A_log", "dt_bias"
    limits = {name: 1e-4 if name.endswith(decays) else 1e-5 for name, _ in model.named_parameters()}
    assert all(off(p.grad, expected[name]) < limits[name] for name, p in model.named_parameters())


@torch.no_grad()
def test_packed_samples_do_not_see_each_other(tiny: Tiny):
    model, samples = load_model(tiny.folder), ragged()
    row = packing.pack(samples)
    logits = model(row.idx, segments=row.segments)
    alone = torch.cat([model(s.tokens[None, :-1].long()) for s in samples], dim=1)
    assert off(logits, alone) < 1e-6
    other = row.idx.clone()
    start, stop = row.segments.offsets[3:5].tolist()
    other[0, start:stop] = 95 - other[0, start:stop]
    changed = (model(other, segments=row.segments) != logits).any(-1)[0]
    assert changed[start:stop].any() and not changed[:start].any() and not changed[stop:].any()


@pytest.mark.parametrize("chunk", [1, 7, 10**9])
@pytest.mark.parametrize("bias", [False, True])
def test_chunked_loss_equals_cross_entropy(monkeypatch, chunk, bias):
    monkeypatch.setattr("lit_gpt.model.loss.MAX_LOGITS", chunk * 50)
    torch.manual_seed(0)
    head = torch.nn.Linear(16, 50, bias=bias)
    hidden, labels = torch.randn(23, 16, requires_grad=True), torch.randint(50, (23,))
    plain = F.cross_entropy(head(hidden), labels, reduction="sum")
    (plain * 3).backward()
    expected = [hidden.grad.clone(), *(p.grad.clone() for p in head.parameters())]
    hidden.grad = None
    head.zero_grad()
    loss = summed_cross_entropy(head, hidden, labels)
    (loss * 3).backward()
    assert off(loss.detach(), plain.detach()) < 1e-6
    assert same([hidden.grad, *(p.grad for p in head.parameters())], expected)
    with torch.no_grad():
        assert off(summed_cross_entropy(head, hidden, labels), plain) < 1e-6
        assert summed_cross_entropy(head, hidden[:0], labels[:0]) == 0


def test_gradients_in_16_bits_are_scaled_in_float32():
    """A factor such as 1 / tokens, itself rounded to 16 bits, would scale all gradients by up to 0.4 % too much."""
    torch.manual_seed(0)
    head, factor = torch.nn.Linear(16, 50, dtype=torch.bfloat16).requires_grad_(False), torch.tensor(1 / 6843)
    hidden, labels = torch.randn(23, 16, dtype=torch.bfloat16, requires_grad=True), torch.randint(50, (23,))
    (whole,) = torch.autograd.grad(summed_cross_entropy(head, hidden, labels), hidden)
    (scaled,) = torch.autograd.grad(summed_cross_entropy(head, hidden, labels) * factor, hidden)
    assert torch.equal(scaled, (whole.double() * factor.double()).bfloat16())


def test_a_gpu_takes_whole_tiles_of_rows(monkeypatch):
    monkeypatch.setattr("lit_gpt.model.loss.MAX_LOGITS", 10 * 50)  # 320 rows on a GPU
    lengths = []
    head = torch.nn.Linear(16, 50)
    head.register_forward_hook(lambda module, inputs, output: lengths.append(len(output)))
    with use_policy(simulate_cuda=True, triton=False):
        summed_cross_entropy(head, torch.randn(700, 16), torch.zeros(700, dtype=torch.int64))
    assert lengths == [256, 256, 188]


def test_no_supervised_token_gives_a_zero_gradient(tiny: Tiny):
    """A rank that has no sample left feeds such a row in the last step."""
    model = lora.attach(load_model(tiny.folder), EVERYTHING)
    sample = dataset.Sample(torch.tensor([1, 2], dtype=torch.int32), torch.zeros(2, dtype=torch.uint8))
    assert all((g == 0).all() for g in gradients(model, [packing.pack([sample])], 1))


def test_rows_are_cut_as_asked():
    lengths = [5, 9, 2, 8, 8, 30]
    assert list(packing.micro_batches([0, 1, 2, 3, 4], lengths, 2, 0)) == [[0, 1], [2, 3], [4]]
    assert list(packing.micro_batches([0, 1, 2, 3, 4, 5], lengths, None, 16)) == [[0, 1, 2], [3, 4], [5]]


def test_order_of_samples():
    """Every sample comes once an epoch, in another order each epoch, and the last step is shorter."""
    steps = [packing.step_samples(10, 4, seed=7, step=s, total=20) for s in range(5)]
    flat = [i for step in steps for i in step]
    assert sorted(flat[:10]) == sorted(flat[10:]) == list(range(10)) and flat[:10] != flat[10:]
    assert len(packing.step_samples(10, 4, seed=7, step=2, total=10)) == 2
    assert steps != [packing.step_samples(10, 4, seed=8, step=s, total=20) for s in range(5)]


def test_scores_are_those_of_the_logits(tiny: Tiny, monkeypatch):
    """Each target has its log-probability and whether it is the likeliest; without targets there is none."""
    monkeypatch.setattr("lit_gpt.model.loss.MAX_LOGITS", 500)
    model = load_model(tiny.folder)
    samples = ragged()
    rows = []
    for s in samples:  # the first supervised token is made the likeliest
        i = int(s.supervised.nonzero()[0])
        with torch.no_grad():
            s.tokens[i] = model(s.tokens[None, :i].long())[0, -1].argmax() if i else s.tokens[i]
            logits = model(s.tokens[None, :-1].long())[0]
        at = s.supervised[1:].bool()
        labels = s.tokens[1:][at].long()
        rows.append((logits[at].log_softmax(-1).gather(1, labels[:, None])[:, 0], logits[at].argmax(-1) == labels))
    row = packing.pack(samples)
    log_p, greedy = model.score(row.idx, row.segments, row.targets)
    assert off(log_p, torch.cat([p for p, _ in rows])) < 1e-5
    assert torch.equal(greedy, torch.cat([g for _, g in rows])) and greedy.sum() >= len(samples) - 1
    assert log_p.dtype == torch.float32 and not greedy.all()
    none = packing.pack([dataset.Sample(samples[0].tokens, torch.zeros_like(samples[0].supervised))])
    assert [len(x) for x in model.score(none.idx, none.segments, none.targets)] == [0, 0]
