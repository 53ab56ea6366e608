"""eval/lm_eval_harness.py against lm-eval's own model for transformers, live, on the same checkpoint."""

import json
import shutil
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from helpers.paths import ROOT
from lit_gpt import Tokenizer
from lit_gpt.checkpoints import folder as checkpoint
from lit_gpt.evaluation.args import HarnessArgs
from lit_gpt.methods import finetuned_file, lora

pytest.importorskip("lm_eval", reason="an extra that brings 38 packages: pip install lm-eval")
from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from lit_gpt.checkpoints.base_model import load_model
from lit_gpt.evaluation.lm_eval_model import load_harness
from lit_gpt.generation.engine import generate
from lit_gpt.text.prompt_style import PromptStyle

SCRIPT, TASKS = "eval/lm_eval_harness.py", ROOT / "tests/evaluation/lm_eval_tasks"
CHATML = (
    "{% for m in messages %}{{ '<|begin|>' if loop.first }}[{{ m.role }}]{{ m.content }}<|end|>{% endfor %}"
    "{{ '[assistant]' if add_generation_prompt }}"
)


def add_bos(folder: Path) -> None:
    """Make the tokenizer one that puts BOS before every text, and give it a chat template that does so too."""
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    new = Tokenizer(folder).vocab_size
    token = {"id": new, "content": "<|begin|>", "single_word": False, "lstrip": False, "rstrip": False}
    tokenizer["added_tokens"].append(token | {"normalized": False, "special": True})
    begin, text = {"SpecialToken": {"id": "<|begin|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}
    tokenizer["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [begin, text],
        "pair": [begin, text, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {"<|begin|>": {"id": "<|begin|>", "ids": [new], "tokens": ["<|begin|>"]}},
    }
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings |= {"bos_token": "<|begin|>", "chat_template": CHATML}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


@pytest.fixture(scope="module", params=["without BOS", "with BOS"])
def folder(request, llama, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoints") / "llama"
    shutil.copytree(llama, folder)
    if request.param == "with BOS":
        add_bos(folder)
    return folder


def hf(folder: Path, **options) -> HFLM:
    return HFLM(pretrained=str(folder), device="cpu", dtype="float32", batch_size=3, **options)


def ours(folder: Path, **changes):
    flags = dict(checkpoint_dir=folder, finetuned_path=None, apply_chat_template=False, max_seq_length=None,
                 batch_tokens=300, precision="fp32", seed=1)  # fmt: skip
    return load_harness(HarnessArgs(**flags | changes))


def instances(kind: str, *arguments: tuple) -> list[Instance]:
    return [Instance(request_type=kind, doc={}, arguments=a, idx=0) for a in arguments]


LONG = "Below is an instruction that describes the cat and the dog, again and again. " * 12


def test_log_probabilities(folder):
    """Of empty, long and shared contexts; of continuations of one token and of many; BOS written out or not."""
    requests = instances(
        "loglikelihood",
        ("", "the cat"), ("", " dog"), ("the dog", " and the cat"), ("the dog ", "and the cat"), ("the", "m"),
        *(("Question: who barks?\nAnswer:", choice) for choice in (" a", " the dog", " the cat", " the dog and")),
        ("<|end|>the dog", " and"), ("<|begin|>the dog", " and"), (LONG, " the end"), (LONG, LONG[:200]),
        ("a", LONG[:230]),
    )  # fmt: skip
    # its cache takes the wrong position where two continuations of other lengths make the same text
    harness, theirs = ours(folder), hf(folder, logits_cache=False)
    expected = theirs.loglikelihood(requests, disable_tqdm=True)
    found = harness.loglikelihood(requests, disable_tqdm=True)
    assert [p for p, _ in found] == pytest.approx([p for p, _ in expected], rel=1e-4)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
    assert harness.cut == 2 and harness.prefix_token_id == theirs.prefix_token_id
    # a greedy continuation is known as one
    text = harness.generate_until(instances("generate_until", ("the dog", {"until": [], "max_gen_toks": 1})))[0]
    ids = harness.tok_encode("the dog"), harness.tok_encode(text, add_special_tokens=False)
    assert harness._loglikelihood_tokens([(None, *ids)], disable_tqdm=True)[0][1]


def test_rolling_log_probabilities(folder):
    requests = instances("loglikelihood_rolling", ("the cat",), (LONG,), (LONG[:97] * 9,), ("a",))
    expected = hf(folder).loglikelihood_rolling(requests, disable_tqdm=True)
    assert ours(folder).loglikelihood_rolling(requests, disable_tqdm=True) == pytest.approx(expected, rel=1e-4)


def test_answers(folder):
    """With and without stop strings, which may lie across tokens; prompts of one length, of many, and too long ones."""
    texts = ["the cat", "the dog", "Question: who?", "the", "describes a task that", LONG]
    free = {"until": [], "max_gen_toks": 30}
    theirs = hf(folder)
    theirs.batch_size_per_gpu = 1  # in a batch it may go on after EOS, and keeps what comes then
    whole = theirs.generate_until(instances("generate_until", *((text, free) for text in texts)), disable_tqdm=True)
    stops = [text[5:8] for text in whole]
    assert all(len(text) > 10 for text in whole)
    requests = instances(
        "generate_until",
        *((text, free) for text in texts),
        *((text, {"until": [stop, "never"], "max_gen_toks": 30}) for text, stop in zip(texts, stops, strict=True)),
        (texts[0], {"until": "\n", "max_gen_toks": 5, "temperature": 0.0, "do_sample": False}),
    )
    expected = theirs.generate_until(requests, disable_tqdm=True)
    harness = ours(folder)
    assert harness.generate_until(requests, disable_tqdm=True) == expected
    assert all(text == full[: full.index(stop)] for text, full, stop in zip(expected[6:], whole, stops, strict=False))
    assert harness.cut == 2
    sampled = instances("generate_until", ("the cat", free | {"do_sample": True, "temperature": 5.0}))
    assert ours(folder).generate_until(sampled) == ours(folder).generate_until(sampled) != whole[:1]


def test_end_tokens_of_the_checkpoint_end_an_answer(folder, tmp_path):
    """As many as generation_config.json names."""
    requests = instances("generate_until", ("the cat", {"until": [], "max_gen_toks": 20}))
    harness = ours(folder)
    ids = list(generate(harness.model, harness.tok_encode("the cat"), 20, temperature=0))
    end = next(i for i in range(3, 20) if ids[i] not in ids[:i])
    shutil.copytree(folder, tmp_path / "c")
    path = tmp_path / "c" / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token_id": [2, ids[end]]}))
    expected = hf(tmp_path / "c").generate_until(requests, disable_tqdm=True)
    assert ours(tmp_path / "c").generate_until(requests, disable_tqdm=True) == expected
    assert expected == [harness.tok.decode(ids[: end + 1])]


def test_chat_templates(folder):
    """Rendered as by the tokenizer, with one BOS; the last message may be the beginning of the answer."""
    if not Tokenizer(folder).chat_template:
        pytest.skip("this checkpoint has none")
    harness, theirs = ours(folder, apply_chat_template=True), hf(folder)
    question = [{"role": "user", "content": "who barks?"}]
    begun = [*question, {"role": "assistant", "content": "the do"}]
    for messages, answer in ((question, True), (begun, False)):
        text = harness.apply_chat_template(messages, answer)
        assert text == theirs.apply_chat_template(messages, answer)
        assert harness.tok_encode(text) == theirs.tok_encode(text)
        assert harness.tok_encode(text).count(harness.prefix_token_id) == 1


@pytest.mark.parametrize("shots", [0, 2])
def test_two_tasks_give_the_figures_of_the_hf_model(cli, llama, tmp_path, monkeypatch, shots):
    """The script's JSON and table: every metric, and every answer of every row."""
    monkeypatch.chdir(ROOT)  # the tasks name their data from there
    names = ["animals_choice", "animals_answer"]
    seeds = dict.fromkeys(("random_seed", "numpy_random_seed", "torch_random_seed", "fewshot_random_seed"), 1234)
    manager = TaskManager(include_path=str(TASKS), include_defaults=False)
    expected = simple_evaluate(hf(llama), tasks=names, task_manager=manager, num_fewshot=shots, **seeds)
    result = cli(SCRIPT, checkpoint_dir=llama, tasks=",".join(names), include_path=TASKS, num_fewshot=shots,
                 out=tmp_path / "o" / "r.json", precision="fp32", log_samples="true")  # fmt: skip
    assert result.code == 0, result.err
    found = json.loads((tmp_path / "o" / "r.json").read_text())
    for name in names:
        assert found["results"][name] == pytest.approx(expected["results"][name])
        assert f"|{name}" in result.out.replace(" ", "")
        for row, other in zip(found["samples"][name], expected["samples"][name], strict=True):
            assert row["prompt_hash"] == other["prompt_hash"] and row["doc_hash"] == other["doc_hash"]
            if name == "animals_answer":
                assert row["resps"] == other["resps"] and row["resps"][0][0]
            else:
                log_p = [[float(p) for p, _ in r["filtered_resps"]] for r in (row, other)]
                assert log_p[0] == pytest.approx(log_p[1], rel=1e-4)


def test_a_finetuned_file_gives_the_figures_of_its_export(cli, llama, tmp_path):
    """LoRA kept in its file, and folded in, exported and read by transformers."""
    state = checkpoint.load_state(llama)
    model = load_model(llama)
    config = lora.LoRAConfig(r=4, alpha=8, dropout=0.0, query=True, value=True)
    lora.attach(model, config)
    torch.manual_seed(1)
    trained = {name: torch.randn_like(tensor) / 4 for name, tensor in finetuned_file.trained_state(model).items()}
    path = tmp_path / "lora.pth"
    style = PromptStyle.from_name("plain", Tokenizer(llama)).to_dict()
    record = {"hyperparameters": asdict(config), "prompt_style": style}
    finetuned_file.save_file(path, "lora", checkpoint.fingerprint(state), trained, **record)
    merged, exported = tmp_path / "merged", tmp_path / "exported"
    assert cli("scripts/merge_lora.py", checkpoint_dir=llama, lora_path=path, out_dir=merged).code == 0
    assert cli("scripts/convert_lit_checkpoint.py", checkpoint_dir=merged, out_dir=exported).code == 0
    requests = instances("loglikelihood", ("the dog", " and the cat"), ("", "the cat"))
    expected = hf(exported).loglikelihood(requests, disable_tqdm=True)
    base = ours(llama).loglikelihood(requests, disable_tqdm=True)
    for harness in (ours(llama, finetuned_path=path), ours(merged)):
        found = harness.loglikelihood(requests, disable_tqdm=True)
        assert [p for p, _ in found] == pytest.approx([p for p, _ in expected], rel=1e-4)
        assert [p for p, _ in found] != pytest.approx([p for p, _ in base], rel=1e-2)


@pytest.mark.parametrize(
    ("change", "words", "code"),
    [
        ({"tasks": ""}, ["--tasks"], 2),
        ({"tasks": "animal_choice"}, ["--tasks animal_choice", "no such task"], 1),
        ({"include_path": "nowhere"}, ["--include_path nowhere"], 1),
        ({"tasks": "broken"}, ["--tasks broken", "cannot be loaded"], 1),
        ({"tasks": "beams"}, ["num_beams"], 1),
        ({"max_seq_length": 9999}, ["--max_seq_length 9999", "256"], 2),
        ({"max_seq_length": 12}, ["12 new tokens", "--max_seq_length 12"], 1),
        ({"out": __file__}, ["--out", "exists already"], 1),
        ({"out_path": __file__}, ["--out", "exists already"], 1),  # the former spelling
        ({"checkpoint_dir": "nowhere"}, ["--checkpoint_dir nowhere"], 1),
    ],
)
def test_refusals(cli, llama, tmp_path, monkeypatch, change, words, code):
    monkeypatch.chdir(ROOT)
    (tmp_path / "t").mkdir()
    task = (TASKS / "animals_answer.yaml").read_text()
    (tmp_path / "t" / "answer.yaml").write_text(task)
    (tmp_path / "t" / "broken.yaml").write_text(
        task.replace("animals_answer", "broken").replace("animals.json", "x.json")
    )
    beams = task.replace("animals_answer", "beams").replace("  until:", "  num_beams: 2\n  until:")
    (tmp_path / "t" / "beams.yaml").write_text(beams)
    flags = dict(checkpoint_dir=llama, tasks="animals_answer", include_path=tmp_path / "t", out=tmp_path / "r.json")
    cli(SCRIPT, **flags | change).refused(*words, code=code)
    assert not (tmp_path / "r.json").exists()
