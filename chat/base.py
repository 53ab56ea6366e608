"""Talk to a checkpoint, or to a finetuned one.

    python chat/base.py --checkpoint_dir checkpoints/HuggingFaceTB/SmolLM2-135M-Instruct
    python chat/base.py --checkpoint_dir checkpoints/tiiuae/falcon-7b \\
        --finetuned_path out/lora/alpaca/lit_model_lora_finetuned.pth

Keeps the conversation as long as the context holds it. Ctrl-C stops an answer, Ctrl-D ends. `/lora PATH` goes on with
another LoRA of the same base, `/lora` with the base alone.
"""

from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

from lit_gpt.cli import ClosedUnitInterval, NonNegativeFloat, NonNegativeInt, PositiveInt, Quantizer, run

checkpoint_dir: Path = Path("checkpoints/tiiuae/falcon-7b")  # converted folder, or what finetune/full.py wrote
finetuned_path: Path | None = None  # what finetune/lora.py, adapter.py or adapter_v2.py wrote
prompt_style: str | None = (
    None  # a style of lit_gpt/text/prompt_style.py or a Jinja file (null: the finetune's or checkpoint's)
)
system: str = ""  # what the conversation opens with, for styles that have a place for it
max_new_tokens: PositiveInt = 512  # longest answer
context: PositiveInt = 4096  # tokens of history and answer together, at most what the model takes
temperature: NonNegativeFloat = 0.7  # divides the logits: higher is more varied, 0 takes the likeliest token
top_k: PositiveInt | None = 200  # sample among this many likeliest tokens (null: all)
top_p: ClosedUnitInterval = 1.0  # sample among the likeliest tokens of together this probability
seed: NonNegativeInt = 1234  # of the sampling
precision: Literal["bf16", "fp16", "fp32"] = "bf16"  # of weights and arithmetic
quantize: Quantizer | None = None  # keep the weights in fewer bits (null: as trained, or as stored)
compile: bool = False  # compile the step of one token where there are no kernels for it: takes seconds at first


def main(hp: SimpleNamespace) -> None:
    from lit_gpt.checkpoints.base_model import BaseCheckpoint
    from lit_gpt.generation.chat import Chat, converse
    from lit_gpt.generation.engine import dtype_of, sampling_options
    from lit_gpt.generation.steps import new_step
    from lit_gpt.hardware import default_device
    from lit_gpt.methods import finetuned_model, lora
    from lit_gpt.methods.multi_lora import LoRAPool
    from lit_gpt.quantization.modules import is_quantized
    from lit_gpt.text.prompt_style import PromptStyle
    from lit_gpt.text.tokenizer import Tokenizer

    place, base = {"dtype": dtype_of(hp), "device": default_device()}, BaseCheckpoint.of(hp.checkpoint_dir, hp.quantize)
    tokenizer = Tokenizer(hp.checkpoint_dir)
    named = hp.prompt_style and PromptStyle.from_name(hp.prompt_style, tokenizer)
    own = style = named or PromptStyle.from_checkpoint(hp.checkpoint_dir, tokenizer)
    method = lora.NAME
    if hp.finetuned_path:
        model, record = finetuned_model.load_finetuned(
            hp.checkpoint_dir, hp.finetuned_path, None, **place, quantize=hp.quantize
        )
        base, method = base.quantized_as(record.get("quantize"), hp.finetuned_path), record["method"]
        if not is_quantized(model):
            lora.merge(model)
        style = named or PromptStyle.from_dict(record["prompt_style"])
    else:
        model = base.build(**place)

    def open_loras() -> LoRAPool:
        return LoRAPool(base.build(**place) if hp.finetuned_path else model, base, own, fixed=bool(named))

    options = sampling_options(hp, model) | {"new_step": partial(new_step, hp)}
    options["open_loras"] = open_loras if method == lora.NAME else None
    chat = Chat(model, tokenizer, style, hp.context, hp.max_new_tokens, **options)
    if hp.system:
        chat.messages.append({"role": "system", "content": hp.system})
    converse(chat)


if __name__ == "__main__":
    run(main)
