"""What people type who come from elsewhere, and what is refused before torch is there."""

import shutil
import subprocess
import sys

import pytest

from helpers.methods import LORAS, lora_files
from helpers.paths import ROOT
from helpers.rows import write_rows
from helpers.runs import metrics
from lit_gpt import cli as command_line
from lit_gpt import habits
from lit_gpt.data.recipe import recipe, too_short
from lit_gpt.errors import UsageError
from lit_gpt.methods.hyperparameters import LoRAConfig
from lit_gpt.training import setup
from lit_gpt.training.args import BatchArgs, OptimizationArgs, TrainArgs
from lit_gpt.training.schedule import Schedule

SCRIPT = {"__file__": str(ROOT / "finetune" / "lora.py"), "__doc__": "", "__annotations__": {}}


def parsed(*argv: str) -> dict:
    return command_line.parse(SCRIPT, list(argv), (LoRAConfig, TrainArgs), {"keep": "keep_states"})


def test_spellings_of_others_are_taken():
    typed = "--learning-rate 0.1 --lora-mlp --precision=32-true --devices auto --epochs .5 --no-lora_query "
    values = parsed(*(typed + "--quantize bnb.nf4 --keep 3 --zero_offload").split())
    wanted = {"learning_rate": 0.1, "lora_mlp": True, "precision": "fp32", "devices": "auto", "epochs": 0.5,
              "lora_query": False, "quantize": "nf4", "keep_states": 3, "zero_offload": True}  # fmt: skip
    assert {name: values[name] for name in wanted} == wanted
    assert parsed("--compile", "--lora_mlp", "false")["compile"] is True


@pytest.mark.parametrize(
    ("flag", "words"),
    [
        ("--lr=1", "here it is --learning_rate"),
        ("--num_train_epochs=1", "here it is --epochs"),
        ("--lora_rank=8", "here it is --lora_r"),
        ("--early_stopping", "here it is --patience"),
        ("--output_dir=x", "here it is --out_dir"),
        ("--train.global_batch_size=8", "here it is --batch_size"),
        ("--gradient_accumulation_steps=4", "--batch_size counts"),
        ("--per-device-train-batch-size=4", "--micro_batch_size"),
        ("--lora_target_modules=all", "--lora_query"),
        ("--wandb", "use --logger wandb"),
        ("--bf16", "use --precision bf16"),
        ("--load_in_4bit", "use --quantize nf4"),
        ("--stop=x", "generate/ and chat/ take it"),
        ("--prompt_style=alpaca", "the data is prepared with"),
        ("--eopchs=3", "did you mean --epochs?"),
        ("--lora_q=true", "did you mean --lora_query?"),
        ("--nothing_like_it=3", "--help lists the flags"),
    ],
)
def test_flags_of_others_lead_to_ours(flag, words):
    with pytest.raises(UsageError) as refused:
        parsed(flag)
    assert words in str(refused.value) and str(refused.value).startswith("unknown flag --")


@pytest.mark.parametrize("script", ["base", "full"])
@pytest.mark.parametrize("flag", ["finetuned_path", "lora_path"])
def test_flags_of_sibling_scripts_lead_there(cli, script, flag):
    cli(f"generate/{script}.py", **{flag: "x.pth"}).refused(f"unknown flag --{flag}: generate/finetuned.py", code=2)


@pytest.mark.parametrize("argv", [["--lora_r", "8 bad"], ["--lora_r=8 bad"]])
def test_a_value_with_blanks_is_shown_whole(argv):
    with pytest.raises(UsageError, match="--lora_r: expected a whole number above 0, got '8 bad'"):
        parsed(*argv)


def test_the_tables_name_flags_that_there_are():
    """No name of ours stands for another flag of ours, and each advice is about a flag that is not ours."""
    ours = set(parsed())
    theirs = {name for names in habits.NAMES.values() for name in names.split()} | habits.ADVICE.keys()
    assert not ours & theirs, ours & theirs
    assert len(ours & habits.NAMES.keys()) > 20


@pytest.mark.parametrize(("rows", "warmup"), [(40, 0), (1280, 3), (50_000, 100), (400_000, 100)])
def test_the_warmup_fits_the_run(rows, warmup):
    """From 300 steps on it is the article's 100."""
    assert Schedule.from_args(OptimizationArgs(), BatchArgs(), rows).warmup == warmup
    assert Schedule.from_args(OptimizationArgs(epochs=0.5), BatchArgs(batch_size=1), 3).steps == 2


@pytest.mark.subprocess
def test_what_needs_no_torch_is_refused_without_it(llama, data_dir, tmp_path):
    """In one process, into which torch is never imported: each is refused in its line."""
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "metrics.csv").write_text("step\n")
    (rows := tmp_path / "rows.jsonl").write_text("")
    llama = shutil.copytree(llama, tmp_path / "base")
    (lora,) = lora_files(llama, LORAS[:1])
    tune = f"finetune/lora.py --checkpoint_dir {llama} --data_dir {data_dir} --out_dir {tmp_path / 'out'} "
    full, has = tune.replace("lora.py", "full.py"), f"--checkpoint_dir {llama} "
    cases = {
        "finetune/lora.py --checkpoint_dir nowhere": "no such folder",
        tune + "--data_dir nowhere": "not a folder of prepared data",
        tune + f"--out_dir {taken}": "already holds a run",
        tune + f"--out_dir {llama}": "the base's own folder",
        tune + f"--out_dir {llama / 'lit_config.json'}": "is a file; expected a folder",
        tune + "--warmup_steps 900": "--warmup_steps 900",
        tune + "--logger wandb": "--logger wandb needs wandb",
        tune + "--optimizer nowhere.Adam": "needs nowhere",
        tune + "--batch_size 8 --micro_batch_size 3": "--micro_batch_size 3",
        tune + "--max_seq_length 5": "--max_seq_length 5",
        tune + "--finetuned_path nowhere.pth": "nowhere.pth: no such file",
        tune + f"--finetuned_path {lora} --lora_r 5 --lora_alpha 7": "--lora_r 5 --lora_alpha 7.0: ",
        tune.replace("lora.py", "adapter.py") + f"--finetuned_path {lora}": "trained by the method lora",
        full + f"--finetuned_path {lora}": "all weights train",
        tune + "--out_dir /proc/nothing": "--out_dir /proc/nothing: nothing can be written in /proc",
        tune + f"--out_dir {llama}/lit_config.json/x": "lit_config.json (Not a directory)",
        tune + "--out_dir=": "--out_dir: expected a path, got ''",
        tune
        + "--config nowhere.json": "--config nowhere.json: expected a JSON or YAML file of flag values: No such file",
        tune + "--probe_path nowhere.jsonl": "nowhere.jsonl: no such file",
        tune + "--min_lr 1": "--min_lr",
        full + "--quantize nf4": "cannot train",
        f"generate/lora.py {has} --prompt x --lora_path nowhere": "--finetuned_path nowhere: no such file",
        f"generate/adapter.py {has} --prompt x --finetuned_path {lora}": "trained by the method lora, expected adapter",
        f"generate/lora.py {has} --prompt x --finetuned_path {llama}/lit_model.pth": f"give --checkpoint_dir {llama}",
        f"generate/finetuned.py {has} --prompt x --finetuned_path {rows}": "rows.jsonl: not a readable file of tensors",
        f"chat/base.py {has} --finetuned_path {rows}": "not a readable file of tensors",
        f"chat/base.py {has} --context 100000": "--context 100000: the model takes 256 tokens",
        f"generate/serve.py {has} --context 100000": "--context 100000: the model takes 256 tokens",
        f"generate/serve.py {has} --finetuned_path {rows}": "not a readable file of tensors",
        f"generate/serve.py {has} --loras a={rows}": "--loras ",
        f"eval/answers.py {has} --data_dir {data_dir} --finetuned_path {rows}": "not a readable file of tensors",
        f"scripts/check.py {has} --data_dir {data_dir} --finetuned_path {rows}": "not a readable file of tensors",
        f"scripts/convert_lit_checkpoint.py {has} --finetuned_path {rows} --out_dir {tmp_path}/new": "not a readable",
        f"scripts/merge_lora.py {has} --finetuned_path {lora} --out_dir /proc/nothing": "can be written in /proc",
        tune + "–lora_r 8": "unknown flag –lora_r; did you mean --lora_r?",
        f"generate/base.py {has}": "--prompt",
        f"generate/base.py {has} --prompt_file {llama}": "is a folder; expected a file in it",
        f"generate/base.py {has} --prompt x --json_schema nowhere.json": "--json_schema nowhere.json: no such file",
        f"generate/base.py {has} --prompt_file {rows} --out /proc/nothing": "--out /proc: nothing can be written",
        f"generate/serve.py {has} --port 99999": "--port 99999: expected a port from 1 to 65535",
        f"generate/serve.py {has} --api_key_file nowhere": "--api_key_file nowhere: cannot be read (No such file or",
        f"eval/answers.py {has} --data_dir {data_dir} --out /proc/nothing/x": "--out /proc/nothing: nothing can be",
        f"eval/answers.py {has} --data_dir {data_dir} --out {llama}": "is a folder; expected a file, such as",
        f"scripts/convert_gguf_checkpoint.py --gguf_path {llama} --out_dir {tmp_path}/new": "expected a GGUF file",
        f"generate/base.py {has} --prompt_file nowhere": "nowhere",
        f"chat/base.py {has} --finetuned_path nowhere": "no such file",
        f"eval/answers.py {has} --data_dir {data_dir} --metric nothing": "--metric nothing",
        f"eval/perplexity.py {has}": "nothing to score",
        f"scripts/merge_lora.py {has} --finetuned_path {lora} --out_dir {taken}": "already exists",
        f"scripts/quantize.py {has} --out_dir {taken}": "already exists",
        f"scripts/prepare_json.py {has} --data_path {tmp_path}/rows.jsonl --out_dir {taken}": "already exists",
        "scripts/plan.py --model falcon-7b --data_dir nowhere": "not a folder of prepared data",
    }
    code = (
        "import runpy, sys\n"
        "sys.modules['wandb'] = None\n"
        "for line in sys.stdin.read().splitlines():\n"
        "    sys.argv = line.split()\n"
        "    try: runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "    except SystemExit as exit: print(exit.code, 'torch' in sys.modules, file=sys.stderr)\n"
    )
    argv = [sys.executable, "-c", code]
    process = subprocess.run(argv, cwd=ROOT, input="\n".join(cases), capture_output=True, text=True)
    said = process.stderr.splitlines()
    assert len(said) == 2 * len(cases), process.stderr
    for (command, words), line, number in zip(cases.items(), said[::2], said[1::2], strict=True):
        assert line.startswith("error: ") and words in line, (command, line)
        assert number in ("1 False", "2 False"), (command, number)


def test_changed_settings_are_refused_before_the_state_is_read(cli, flags, monkeypatch):
    flags["max_steps"] = 3
    assert cli("finetune/lora.py", **flags).code == 0
    monkeypatch.setattr(setup, "run", None)
    other = flags | {"resume": "auto", "lora_r": 4, "seed": 5}
    cli("finetune/lora.py", **other).refused("--lora_r 4 --seed 5: ", "state/step_", "has --lora_r 8 --seed 1337")


@pytest.mark.parametrize("rows", [3, 20])
def test_the_next_command_works_for_few_rows(cli, llama, tmp_path, rows):
    path = write_rows(tmp_path / "r.jsonl")
    path.write_text("".join(path.read_text().splitlines(True)[:rows]))
    out = cli("scripts/prepare_json.py", checkpoint_dir=llama, data_path=path, out_dir=tmp_path / "d").out
    script, *argv = out.partition("next: python ")[2].split()
    more = {"out_dir": tmp_path / "out", "max_steps": 3, "sample_tokens": 0}
    result = cli(script, *argv, **more)
    assert result.code == 0, result.err
    assert len(metrics(tmp_path / "out")) == 4


def test_a_run_too_short_to_learn_says_so(cli, flags):
    assert "2 optimizer steps" in too_short(190, 2) and "--batch_size 4 --epochs 2 makes 95" in too_short(190, 2)
    assert too_short(190, 48) == too_short(50_000, 10) == ""
    more = flags | {"max_steps": "null", "epochs": 1, "warmup_steps": 0, "sample_tokens": 0}
    result = cli("finetune/lora.py", **more)
    assert result.code == 0 and "the run takes 3 optimizer steps, which are too few" in result.out, result.err


def test_the_recipe_leaves_the_article_alone():
    assert recipe(12_800) == recipe(50_000) == ""
    assert "--epochs 6" in recipe(50) and "--batch_size 4" in recipe(50)
    assert "--epochs" not in recipe(1000) and "--batch_size 8" in recipe(1000) and "--batch_size 16" in recipe(5000)
