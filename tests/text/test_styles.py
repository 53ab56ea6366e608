"""Prompt styles by what a template wants: arguments as text or objects, a system message; and what a finetune left."""

import codecs
import json
import shutil

import pytest
import tokenizers
from tokenizers.processors import TemplateProcessing

from helpers.chat_templates import call, says
from lit_gpt import Tokenizer
from lit_gpt.errors import UserError
from lit_gpt.text.messages import instruction_messages
from lit_gpt.text.prompt_style import PromptStyle

CALLS = "{% for c in m.tool_calls or [] %}{{ '<call>' }}SHOW{{ '</call>' }}{% endfor %}"
TEMPLATE = "{% for m in messages %}{{ m.role + ': ' + (m.content or '') }}" + CALLS + "{{ eos_token }}{% endfor %}"
WANTS = {
    "an object": "{{ c.function.arguments | tojson }}",
    "its fields": "{% for k, v in c.function.arguments.items() %}{{ k + '=' ~ v }}{% endfor %}",
    "text": "{{ c.function.arguments }}",
    "text, joined": "{{ '' + c.function.arguments }}",
    "either": "{{ c.function.arguments if c.function.arguments is string else c.function.arguments | tojson }}",
}


@pytest.fixture
def style_of(llama, tmp_path):
    def make(template: str) -> tuple[PromptStyle, Tokenizer]:
        (tmp_path / "t.jinja").write_text(template)
        tokenizer = Tokenizer(llama)
        return PromptStyle.from_name(str(tmp_path / "t.jinja"), tokenizer), tokenizer

    return make


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("wants", WANTS)
def test_arguments_are_spelled_as_the_template_wants_them(style_of, wants, strict):
    """Given as text or as an object they are taught alike; also where the template asks for a system message."""
    refusal = "{{ raise_exception('no system') if messages[0].role != 'system' }}" if strict else ""
    style, tokenizer = style_of(refusal + TEMPLATE.replace("SHOW", WANTS[wants]))
    as_object = call("act", x=0, city="Köln")
    as_text = {"type": "function", "function": {"name": "act", "arguments": '{"x": 0, "city": "Köln"}'}}
    shown = "x=0city=Köln" if wants == "its fields" else '{"x": 0, "city": "Köln"}'
    for given in (as_object, as_text):
        messages = [says("system", "s"), says("user", "q"), says("assistant", "", tool_calls=[given])]
        assert f"<call>{shown}</call>" in style.render(messages, tokenizer)


def test_arguments_of_no_text_and_of_broken_text(style_of):
    style, tokenizer = style_of(TEMPLATE.replace("SHOW", WANTS["an object"]))
    given = {"function": {"name": "act", "arguments": ""}}
    assert "<call>{}</call>" in style.render([says("user", "q"), says("assistant", "", tool_calls=[given])], tokenizer)
    given = {"function": {"name": "act", "arguments": "{"}}
    with pytest.raises(UserError, match="'arguments' is text, not JSON"):
        style.render([says("user", "q"), says("assistant", "", tool_calls=[given])], tokenizer)


def test_a_template_that_wants_a_system_message_ends_as_it_does_with_one(style_of, llama):
    turns = "{% for m in messages %}{{ m.content + eos_token }}{% endfor %}"
    plain, tokenizer = style_of(turns)
    strict, _ = style_of("{{ raise_exception('no system') if messages[0].role != 'system' }}" + turns)
    assert strict.stop_ids == plain.stop_ids == (tokenizer.eos_id,)
    never, _ = style_of("{{ raise_exception('no') }}")
    assert never.stop_ids == (tokenizer.eos_id,)


def test_llama_2_has_end_and_begin_tokens_between_turns(llama, tmp_path):
    """As published: `<s>[INST] q [/INST] a</s><s>[INST] ...`, and transformers makes the same tokens."""
    from transformers import AutoTokenizer

    shutil.copytree(llama, tmp_path / "c")
    tokens = tokenizers.Tokenizer.from_file(str(tmp_path / "c" / "tokenizer.json"))
    tokens.add_special_tokens(["<s>"])
    begin = [("<s>", tokens.token_to_id("<s>"))]
    tokens.post_processor = TemplateProcessing(single="<s> $A", special_tokens=begin)
    tokens.save(str(tmp_path / "c" / "tokenizer.json"))
    settings = json.loads((tmp_path / "c" / "tokenizer_config.json").read_text())
    (tmp_path / "c" / "tokenizer_config.json").write_text(json.dumps(settings | {"bos_token": "<s>"}))
    tokenizer = Tokenizer(tmp_path / "c")
    style = PromptStyle.from_name("llama2", tokenizer)
    turns = [says("system", "s"), says("user", "a"), says("assistant", "b"), says("user", "c"), says("assistant", "d")]
    text = tokenizer.decode(style.encode_sample(turns, tokenizer).ids, skip_special_tokens=False)
    expected = "<s>[INST] <<SYS>>\ns\n<</SYS>>\n\na [/INST] b<|end|><s>[INST] c [/INST] d<|end|>"
    assert text == expected
    style.write_template(tmp_path / "c", tokenizer)
    theirs = AutoTokenizer.from_pretrained(tmp_path / "c")
    assert theirs.apply_chat_template(turns, tokenize=False) == expected
    plain = Tokenizer(llama)  # adds no BOS, and neither does the style
    assert "<s>" not in PromptStyle.from_name("llama2", plain).render(turns, plain)


def test_auto_is_the_style_that_a_finetune_left(cli, llama, tmp_path):
    """Not alpaca, which is what a checkpoint without a template gets at first."""
    from helpers.rows import write_rows

    shutil.copytree(llama, tmp_path / "merged")
    assert PromptStyle.from_name("auto", Tokenizer(tmp_path / "merged")).name == "alpaca"
    PromptStyle.from_name("plain", Tokenizer(llama)).save(tmp_path / "merged")
    assert PromptStyle.from_name("auto", Tokenizer(tmp_path / "merged")).name == "plain"
    result = cli("scripts/prepare_json.py", checkpoint_dir=tmp_path / "merged", out_dir=tmp_path / "d",
                 data_path=write_rows(tmp_path / "r.jsonl"))  # fmt: skip
    assert result.code == 0 and "prompt style plain" in result.out


def test_a_mark_of_byte_order_is_no_part_of_a_template(llama, tmp_path):
    """Nor of the one that goes along with an export, which transformers would render."""
    shutil.copytree(llama, tmp_path / "c")
    template = "{% for m in messages %}{{ m.content + eos_token }}{% endfor %}"
    (tmp_path / "c" / "chat_template.jinja").write_bytes(codecs.BOM_UTF8 + template.encode())
    tokenizer = Tokenizer(tmp_path / "c")
    style = PromptStyle.from_checkpoint(tmp_path / "c", tokenizer)
    assert style.render(instruction_messages("a", "", "b"), tokenizer) == "a<|end|>b<|end|>"
    style.write_template(tmp_path / "c", tokenizer)
    assert (tmp_path / "c" / "chat_template.jinja").read_text() == template
