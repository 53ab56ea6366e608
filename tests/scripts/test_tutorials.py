"""Every command of tutorials/*.md is run, in the order of its page, on a tiny model that stands in for Falcon-7B; and
what the pages show, name and link is checked against that. A command that nothing here knows to run is a failure."""

import json
import re
import runpy
import shlex
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from helpers.pages import BASE, SLURM, blocks, commands, in_process, is_plan, run_page
from helpers.paths import ROOT
from lit_gpt.cli import annotated_groups, parse
from lit_gpt.distributed import heartbeat
from lit_gpt.errors import UserError
from lit_gpt.text import prompt_style
from lit_gpt.training import checks, objectives
from lit_gpt.training.args import BatchArgs, OptimizationArgs, TrainArgs

PAGES = sorted((ROOT / "tutorials").glob("*.md"))
# Those whose likes take as long again.
LONG = ("many_devices_fabric_run", "many_devices_torchrun", "many_devices_slurm", "out_of_memory")
PLAN = ROOT / "scripts/plan.py"


def each(pages: list[Path]) -> list:
    """Return the pages as parameters, the long ones slow."""
    return [pytest.param(p, id=p.stem, marks=pytest.mark.slow if p.stem in LONG else []) for p in pages]


pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the stand-ins are for the CPU")

FINETUNE = f"python finetune/lora.py --checkpoint_dir {BASE} --data_dir data/alpaca --max_steps 2 --warmup_steps 0 "
FILMS = f"python scripts/prepare_json.py --checkpoint_dir {BASE} --json_path films.jsonl --destination_path "
EXPORT = "python scripts/convert_lit_checkpoint.py --checkpoint_dir out/falcon-7b-alpaca "
SERVE = f"python generate/serve.py --checkpoint_dir {BASE} --port 0"
ANSWER = f"python generate/base.py --checkpoint_dir {BASE}"


def edit(path: str, change: Callable[[str], str]) -> Callable[[], None]:
    return lambda: Path(path).write_text(change(Path(path).read_text()))


def another_data() -> None:
    shutil.rmtree("data/alpaca")
    shutil.move("data/other", "data/alpaca")


def damage_states() -> None:
    for path in Path("out/lora/alpaca/state").iterdir():
        path.write_bytes(b"")


def out_of_memory() -> None:
    def pack(samples):
        raise torch.OutOfMemoryError("tried to allocate 2 GiB")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(objectives, "pack", pack)
        in_process((FINETUNE + "--out_dir out/oom").split()[1:])


def without(package: str, command: str) -> Callable[[], None]:
    def refuse() -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(sys.modules, package, None)
            in_process(shlex.split(command)[1:])

    return refuse


def probe_with_another_column() -> None:
    Path("probe.csv").write_text("story\nThe cat sat.\n")
    in_process((FINETUNE + "--out_dir out/x --probe_path probe.csv").split()[1:])


def two_ranks(batch: BatchArgs, optimization: OptimizationArgs) -> Callable[[], None]:
    """What two ranks refuse, asked of the check itself."""

    def check() -> None:
        with pytest.raises(UserError) as refused:
            checks.check_batch(TrainArgs(batch=batch, optimization=optimization), world_size=2)
        print(f"error: {refused.value}")

    return check


def lost_template() -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prompt_style.PromptStyle, "write_template", lambda *_: None)
        in_process((EXPORT + "--out_dir out/x").split()[1:])


def another_base() -> None:
    path = Path("out/lora/wide/lit_model_lora_finetuned.pth")
    torch.save(torch.load(path) | {"base": "0123456789abcdef"}, path)


def untrained_lora() -> None:
    record = torch.load("out/lora/alpaca/lit_model_lora_finetuned.pth")
    state = {name: tensor * (0 if "lora_B" in name else 1) for name, tensor in record["state"].items()}
    torch.save(record | {"state": state}, "out/lora/fresh.pth")


def large_lora() -> None:
    shutil.copyfile("out/lora/alpaca/lit_model_lora_finetuned.pth", "out/lora/large.pth")


def lost_rank() -> None:  # tests/distributed/test_devices.py kills one
    print(f"error: rank 0: lost touch with another process of the run{heartbeat.Heartbeat.ADVICE}")


# What goes wrong on each page: commands, with variables of the environment, and what must happen before them.
MISTAKES = {
    "finetune_lora.md": [
        FINETUNE + "--out_dir out/x --warmup_steps 100",
        FINETUNE + "--out_dir out/lora/alpaca",
        FINETUNE + "--out_dir out/x --lora_query false --lora_value false",
        edit("data/alpaca/data.json", lambda text: re.sub(r'("tokenizer": ")\w+', r"\1other", text)),
        FINETUNE + "--out_dir out/x",
    ],
    "methods.md": [
        FINETUNE + "--out_dir out/x --lora_update vera --lora_train B",
        FINETUNE + "--out_dir out/x --lora_init pissa --lora_r 65",
        FINETUNE + "--out_dir out/x --lora_update dora --strategy fsdp",
        f"python scripts/combine_loras.py --checkpoint_dir {BASE} --out_dir out/x --loras "
        "out/lora/dora/lit_model_lora_finetuned.pth out/lora/rs/lit_model_lora_finetuned.pth",
    ],
    "finetune_adapter.md": [
        FINETUNE.replace("lora", "adapter") + "--out_dir out/x",
        f"python generate/adapter_v2.py --checkpoint_dir {BASE} --prompt x "
        "--adapter_path out/adapter/alpaca/lit_model_adapter_finetuned.pth",
    ],
    "finetune_full.md": [
        FINETUNE.replace("lora", "full") + f"--out_dir {BASE}",
        FINETUNE.replace("lora", "full") + "--out_dir out/x --optimizer_in_backward true",
    ],
    "one_gpu.md": [
        FINETUNE + "--out_dir out/x --device cuda",
        FINETUNE + "--out_dir out/x --precision fp16 --strategy deepspeed",
    ],
    "many_devices.md": [
        lost_rank,
        f"python generate/base.py --checkpoint_dir {BASE} --prompt x --device cpu --devices 2",
        two_ranks(BatchArgs(batch_size=5), OptimizationArgs()),
        two_ranks(BatchArgs(batch_size=4), OptimizationArgs(optimizer_in_backward=True)),
    ],
    "many_devices_torchrun.md": [
        ({"TORCHELASTIC_RUN_ID": "x", "WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0"}, FINETUNE + "--out_dir out/x")
    ],
    "many_devices_fabric_run.md": [
        ({"LT_CLI_USED": "1", "LT_DEVICES": "1", "LT_PRECISION": "bf16"}, FINETUNE + "--out_dir out/x"),
        ({"LT_CLI_USED": "1", "LT_DEVICES": "1"}, FINETUNE + "--out_dir out/x --devices 2"),
        ({"LT_CLI_USED": "1", "LT_STRATEGY": "deepspeed_stage_3"}, FINETUNE + "--out_dir out/x"),
    ],
    "many_devices_slurm.md": [
        (SLURM | {"SLURM_NTASKS_PER_NODE": "2"}, FINETUNE + "--out_dir out/x"),
        (SLURM, FINETUNE + "--out_dir out/x --devices 2"),
    ],
    "check.md": [FINETUNE + "--out_dir out/x --check true --devices 2"],
    "coming_from.md": [FINETUNE + "--out_dir out/x --lr 0.1"],
    "chat.md": [f"python chat/base.py --checkpoint_dir {BASE} --max_new_tokens 4096"],
    "generate.md": [
        f"{ANSWER} --prompt_file prompts.jsonl --out answers.jsonl --temperature 0",
        edit("prompts.jsonl", lambda text: text + '{"question": "who?"}\n'),
        f"{ANSWER} --prompt_file prompts.jsonl --out answers.jsonl --max_new_tokens 4",
        f"{ANSWER} --prompt dog --max_new_tokens 3000",
        another_base,
        f"{ANSWER} --prompt_file mixed.jsonl --out x.jsonl",
    ],
    "serve.md": [
        f"{SERVE} --host 0.0.0.0",
        f"{SERVE} --loras out/lora/alpaca/lit_model_lora_finetuned.pth",
        untrained_lora,
        f"{SERVE} --loras fresh=out/lora/fresh.pth",
        large_lora,
        f"{SERVE} --loras large=out/lora/large.pth --lora_bytes 1000",
        f"{SERVE} --batch_size 1000000000",
    ],
    "quantize.md": [
        f"python generate/base.py --checkpoint_dir {BASE}-nf4 --quantize nf4 --prompt x",
        f"python generate/lora.py --checkpoint_dir {BASE} --quantize int8 --prompt x "
        "--lora_path out/lora/qlora/lit_model_lora_finetuned.pth",
        FINETUNE.replace("lora", "full") + "--out_dir out/x --quantize nf4",
        FINETUNE + "--out_dir out/x --quantize nf4 --strategy fsdp",
        f"python scripts/convert_lit_checkpoint.py --checkpoint_dir {BASE}-nf4 --out_dir out/x",
    ],
    "resume.md": [
        FINETUNE + "--out_dir out/lora/alpaca --resume auto --max_steps 40 --batch_size 4 --learning_rate 0.1",
        FINETUNE + "--out_dir out/lora/alpaca",
        another_data,
        FINETUNE + "--out_dir out/lora/alpaca --resume auto --max_steps 40 --batch_size 4",
        damage_states,
        FINETUNE + "--out_dir out/lora/alpaca --resume auto --max_steps 40 --batch_size 4",
    ],
    "evaluate.md": [
        probe_with_another_column,
        without("lm_eval", f"python eval/lm_eval_harness.py --checkpoint_dir {BASE} --tasks gsm8k"),
    ],
    "monitor.md": [
        "python scripts/report.py data/alpaca",
        edit("sweep.yaml", lambda text: text.replace("max_steps: 20", "max_steps: 30")),
        "python scripts/sweep.py --sweep_path sweep.yaml --out_dir out/sweep",
        without("wandb", FINETUNE + "--out_dir out/x --logger wandb"),
    ],
    "out_of_memory.md": [
        out_of_memory,
        without("bitsandbytes", FINETUNE + "--out_dir out/b --optimizer adamw8bit"),
        FINETUNE.replace("lora", "full") + "--out_dir out/x --optimizer_in_backward true --batch_size 8",
    ],
    "export.md": [
        lost_template,
        EXPORT + "--out_dir out/falcon-7b-alpaca-hf",
        f"{EXPORT} --out_dir out/x --format gguf --lora_path out/lora/alpaca/lit_model_lora_finetuned.pth",
        FINETUNE + "--out_dir out/x --lora_r 4 --lora_path out/lora/from-peft/lit_model_lora_finetuned.pth",
        edit(
            "out/falcon-7b-alpaca-peft/adapter_config.json", lambda text: '{"alora_invocation_tokens": [1],' + text[1:]
        ),
        f"python scripts/convert_peft_adapter.py --checkpoint_dir {BASE} --out_dir out/x "
        "--peft_dir out/falcon-7b-alpaca-peft",
    ],
    "custom_data.md": [
        FILMS.replace("films.jsonl", "quiz.csv") + "data/x",
        FILMS + "data/films",
        FILMS + "data/x --max_seq_length 20",
        edit("films.jsonl", lambda text: text.replace(", ", " ")),
        FILMS + "data/x",
        edit("chats.json", lambda text: text.replace("role", "speaker")),
        FILMS.replace("films.jsonl", "chats.json") + "data/x",
        lambda: Path("films.csv").write_bytes(
            "instruction,output\nA film?,Alien.\nA sad film?,Am\u00e9lie.\n".encode("latin-1")
        ),
        FILMS.replace("films.jsonl", "films.csv") + "data/x",
        lambda: Path("quotes.csv").write_text(
            'instruction,output\nA film?,Alien.\n"So be it" who?,"x\nA western?,Shane.\n'
        ),
        FILMS.replace("films.jsonl", "quotes.csv") + "data/x",
    ],
}


@pytest.mark.subprocess
@pytest.mark.parametrize("page", each(PAGES))
def test_the_page_does_what_it_says(page, place, llama, capfd):
    """Its commands run, its mistakes are refused, and the lines that it shows were seen, numbers apart."""
    wanted = [command for block in blocks(page, "bash") for command in commands(block)]
    reader = run_page(page.name, wanted, place, llama, capfd)
    reader.make_mistakes(MISTAKES.get(page.name, ()))
    seen = normal(reader.output)
    for block in blocks(page, "text"):
        for line in block.splitlines():
            assert normal(line) in seen, (line, reader.output)


def normal(text: str) -> str:
    """With every number as #, and runs of blanks as one."""
    return re.sub(r"\s+", " ", re.sub(r"\d+([.,]\d+)*(e[+-]?\d+)?", "#", text)).strip()


@pytest.mark.skipif(not PLAN.exists(), reason="scripts/plan.py is not here")
@pytest.mark.parametrize("page", each([page for page in PAGES if is_plan(page.read_text("utf-8"))]))
def test_plans(page, place, llama, capfd):
    shutil.copytree(llama, BASE)
    for command in [c for block in blocks(page, "bash") for c in commands(block) if is_plan(c)]:
        code, (out, err) = in_process(shlex.split(command)[1:]), capfd.readouterr()
        assert code in (0, 1) and out and "Traceback" not in err, (command, err)  # 1: it may say that nothing fits


SCRIPT_OF = {"finetune_adapter.md": "adapter", "finetune_full.md": "full", "custom_data.md": "../scripts/prepare_json"}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_defaults_and_links(page):
    """Rows `--flag | default` have the script's own default; links lead to files and headings that exist."""
    text = page.read_text(encoding="utf-8")
    script = (ROOT / "finetune" / f"{SCRIPT_OF.get(page.name, 'lora')}.py").resolve()
    names = runpy.run_path(str(script))
    defaults = parse(names, [], annotated_groups(names["main"]))
    # a page of a launcher has a table of the launcher's flags
    table = text.partition("## Hyperparameters that matter")[2].partition("\n## ")[0]
    for name, value in re.findall(r"^\| `--(\w+)` \| (\S+) \|", table, re.MULTILINE):
        shown = json.loads(value) if re.fullmatch(r"[\d.]+|true|false|null", value) else value
        assert defaults[name] == shown, (name, defaults[name])
    for target, heading in re.findall(r"\]\(([^)#:]*)(?:#([^)]*))?\)", text):
        to = (page.parent / target).resolve() if target else page
        assert to.exists(), target
        headings = re.findall(r"^#+ (.*)$", to.read_text(encoding="utf-8"), re.MULTILINE)
        assert not heading or heading in [re.sub(r"[^\w -]", "", h).lower().replace(" ", "-") for h in headings]


def test_readme_lists_the_pages():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert all(f"(tutorials/{page.name})" in readme for page in PAGES)
