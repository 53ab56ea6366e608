"""Serve a checkpoint, alone or with finetuned files, by the API that OpenAI's clients speak.

    python generate/serve.py --checkpoint_dir checkpoints/tiiuae/falcon-7b \\
        --loras alpaca=out/lora/alpaca/lit_model_lora_finetuned.pth

Requests name the base (by its folder's name) or a LoRA by its own; all are answered in one batch, each through its own
weights. http://127.0.0.1:8000 shows a page that asks several side by side. Needs `pip install -e '.[serve]'`.
"""

from pathlib import Path

from lit_gpt.cli import run
from lit_gpt.errors import require
from lit_gpt.generation.args import ModelArgs
from lit_gpt.serving.args import ServeArgs
from lit_gpt.serving.checks import check_early

checkpoint_dir: Path = Path("checkpoints/tiiuae/falcon-7b")  # Read a converted folder, or what finetune/full.py wrote.
loras: list[str] = []  # Serve these LoRA files beside the base, each given as NAME=FILE.
loras_dir: Path | None = None  # Serve the LoRA files in this folder too, as they come and go.
finetuned_path: Path | None = None  # Attach this file of any method, and serve it alone.
prompt_style: str | None = None  # Render in this style, or a Jinja file (null: the finetune's or the checkpoint's).


def main(server: ServeArgs, model: ModelArgs) -> None:
    for package in ("starlette", "uvicorn"):
        require(package, "serve", "generate/serve.py")
    files, key = check_early(server, checkpoint_dir, loras, loras_dir, finetuned_path)
    from lit_gpt.checkpoints.base_model import BaseCheckpoint
    from lit_gpt.distributed.placement import place
    from lit_gpt.hardware import DTYPES
    from lit_gpt.serving.catalog import Catalog
    from lit_gpt.serving.server import serve
    from lit_gpt.text.prompt_style import PromptStyle

    base = BaseCheckpoint.open(checkpoint_dir, model.quantize, resident=True)
    style = PromptStyle.from_name(prompt_style, base.tokenizer) if prompt_style else None
    where = {"dtype": DTYPES[model.precision], "device": place(model.device, model.devices)}
    if finetuned_path:
        catalog = Catalog.with_finetuned(base, finetuned_path, style, **where)
    else:
        room = {"folder": loras_dir, "limit": server.lora_bytes, "rows": server.batch_size}
        catalog = Catalog.with_loras(base, files, style, **room, **where)
    serve(catalog, server, key, model.compile)


if __name__ == "__main__":
    run(main)
