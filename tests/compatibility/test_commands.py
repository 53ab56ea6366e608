"""Every command of README.md and of all tutorials as they stood at commit 2d5ab8b still runs, in its page's order."""

import shlex
import shutil
from pathlib import Path

import pytest
import torch

from helpers.pages import BASE, blocks, commands, in_process, is_plan, run_page

PAGES = sorted((Path(__file__).parent / "commands_2d5ab8b").glob("*.md"))
QUICK = ("finetune_lora", "readme")  # run in `make test` too
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the stand-ins are for the CPU")


def commands_of(page: Path) -> list[str]:
    return [command for block in blocks(page, "bash") for command in commands(block)]


def cases(pages: list[Path]) -> list:
    """Mark all pages but the quick ones as slow: tests/scripts/test_tutorials.py runs most of their commands too."""
    return [pytest.param(page, id=page.stem, marks=[] if page.stem in QUICK else pytest.mark.slow) for page in pages]


@pytest.mark.subprocess
@pytest.mark.parametrize("page", cases(PAGES))
def test_the_commands_of_before_run(page, place, llama, capfd):
    shutil.copy("alpaca.jsonl", "my.jsonl")  # README's reader brings it
    run_page(page.name, commands_of(page), place, llama, capfd)


@pytest.mark.parametrize("page", cases([page for page in PAGES if any(map(is_plan, commands_of(page)))]))
def test_the_plans_of_before_run(page, place, llama, capfd):
    shutil.copytree(llama, BASE)
    for command in filter(is_plan, commands_of(page)):
        code, (out, err) = in_process(shlex.split(command)[1:]), capfd.readouterr()
        assert code in (0, 1) and out and "Traceback" not in err, (command, err)  # 1: it may say that nothing fits
