"""Talk to a checkpoint, or to a finetuned one.

    python chat/base.py --checkpoint_dir checkpoints/HuggingFaceTB/SmolLM2-135M-Instruct
    python chat/base.py --checkpoint_dir checkpoints/tiiuae/falcon-7b \\
        --finetuned_path out/lora/alpaca/lit_model_lora_finetuned.pth

Keeps the conversation as long as the context holds it. Ctrl-C stops an answer, /exit or Ctrl-D ends, /help lists the
other commands: `/lora PATH` goes on with another LoRA of the same base, `/lora` with the base alone.
"""

from pathlib import Path

from lit_gpt.checkpoints.folder import check_inputs
from lit_gpt.cli import NonNegativeFloat, PositiveInt, run
from lit_gpt.generation.args import ModelArgs, SamplingArgs, context_of
from lit_gpt.model.config import Config

checkpoint_dir: Path = Path("checkpoints/tiiuae/falcon-7b")  # Read a converted folder, or what finetune/full.py wrote.
finetuned_path: Path | None = None  # Attach what a script of finetune/ wrote.
prompt_style: str | None = None  # Render in this style, or a Jinja file (null: the finetune's or the checkpoint's).
system: str = ""  # Open the conversation with this, for styles that have a place for it.
context: PositiveInt | None = None  # Keep this many tokens of history and answer together (null: up to 4096).
max_new_tokens: PositiveInt = 512
temperature: NonNegativeFloat = 0.7


def main(sampling: SamplingArgs, model: ModelArgs) -> None:
    check_inputs(checkpoint_dir, finetuned_path)
    tokens = context_of(context, 4096, Config.from_checkpoint(checkpoint_dir).block_size)
    from lit_gpt.checkpoints.base_model import BaseCheckpoint
    from lit_gpt.distributed.placement import place
    from lit_gpt.generation.chat import Chat
    from lit_gpt.generation.commands import converse, greeting, say
    from lit_gpt.hardware import DTYPES
    from lit_gpt.methods.finetuned_model import build_finetuned, method_of
    from lit_gpt.methods.multi_lora import LoRAPool
    from lit_gpt.quantization.modules import is_quantized
    from lit_gpt.text.prompt_style import PromptStyle

    device = {"dtype": DTYPES[model.precision], "device": place(model.device, model.devices)}
    base = BaseCheckpoint.open(checkpoint_dir, model.quantize, resident=True)
    own = style = PromptStyle.from_name(prompt_style, base.tokenizer) if prompt_style else base.prompt_style
    method = None
    if finetuned_path:
        gpt, record = build_finetuned(base, finetuned_path, None, **device)
        base = base.quantized_as(record.get("quantize"), finetuned_path)
        method = method_of(record, finetuned_path)
        if method.merges and not is_quantized(gpt):
            method.merge(gpt)
        style = own if prompt_style else PromptStyle.from_dict(record["prompt_style"])
    else:
        gpt = base.build(**device)

    def open_loras() -> LoRAPool:
        return LoRAPool(base.build(**device) if finetuned_path else gpt, base, own, fixed=bool(prompt_style))

    chat = Chat(
        gpt,
        base.tokenizer,
        style,
        tokens,
        sampling,
        open_loras if method is None or method.merges else None,
        model.compile,
    )
    if system:
        chat.messages.append({"role": "system", "content": system})
    say(greeting(str(checkpoint_dir), method.name if method else None, chat))
    converse(chat)


if __name__ == "__main__":
    run(main)
