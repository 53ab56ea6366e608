"""Styles of models that were published without a chat template render as their model cards say."""

import pytest

from lit_gpt.text.prompt_style import PromptStyle
from lit_gpt.text.tokenizer import Tokenizer

# what a question, its answer and another question give; END is the tokenizer's end token
RENDERED = {
    "redpajama-incite": "<human>: hi\n<bot>: yesEND<human>: and?\n<bot>:",
    "stablelm-alpha": "<|USER|>hi<|ASSISTANT|>yesEND<|USER|>and?<|ASSISTANT|>",
    "stable-beluga": "### User:\nhi\n\n### Assistant:\nyesEND### User:\nand?\n\n### Assistant:\n",
    "open-assistant": "<|prompter|>hiEND<|assistant|>yesEND<|prompter|>and?END<|assistant|>",
    "h2ogpt": "<|prompt|>hiEND<|answer|>yesEND<|prompt|>and?END<|answer|>",
    "phi-2": "Instruct: hi\nOutput: yesENDInstruct: and?\nOutput:",
    "vicuna": "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
    "detailed, and polite answers to the user's questions. USER: hi ASSISTANT: yesENDUSER: and? ASSISTANT:",
}


@pytest.mark.parametrize("name", RENDERED)
def test_a_known_style_renders_as_published(llama, name):
    """And the answer with its end token is what is learned of it."""
    tokenizer = Tokenizer(llama)
    style = PromptStyle.from_name(name, tokenizer)
    messages = [
        {"role": role, "content": text} for role, text in (("user", "hi"), ("assistant", "yes"), ("user", "and?"))
    ]
    text = style.render(messages, tokenizer, answer=True)
    assert text == RENDERED[name].replace("END", tokenizer.eos_token)
    sample = style.encode_sample(messages[:2], tokenizer)
    learned = [token for token, kept in zip(sample.ids, sample.supervised, strict=True) if kept]
    assert tokenizer.decode(learned).strip() == "yes" and learned[-1] in style.stop_ids
    system = [{"role": "system", "content": "Be brief."}, *messages]
    assert "Be brief." in style.render(system, tokenizer, answer=True)
