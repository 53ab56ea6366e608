"""Rows in the forms that people bring: each is read for what it says, or refused in one line; nothing is lost."""

import json
from pathlib import Path

import pytest

from helpers.rows import write_rows
from lit_gpt.data.args import ColumnArgs
from lit_gpt.data.conversations import BadRow, Conversation, to_conversation
from lit_gpt.data.sources import Row, Source
from lit_gpt.errors import UserError

Q, A = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
CALL = {"name": "act", "arguments": {"x": 0}}
COLUMNS = ColumnArgs()


def read(fields: dict, columns: ColumnArgs = COLUMNS, filled: bool = False) -> Conversation:
    return to_conversation(Row("r.jsonl: line 1", fields, filled=filled), columns)


def said(fields: dict, columns: ColumnArgs = COLUMNS) -> list[tuple[str, str]]:
    return [(m["role"], m.get("content", "")) for m in read(fields, columns).messages]


def read_file(path: Path, text: str | bytes) -> list[Row]:
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return list(Source(str(path)).rows())


ASKED = [("user", "q"), ("assistant", "a")]
BRIEF = ("system", "Be brief.")
TALK = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
FORMS = {
    "ShareGPT": ({"conversations": TALK}, ASKED),
    "its names under OpenAI's keys": (
        {"messages": [{"role": "human", "content": "q"}, {"role": "GPT", "content": "a"}]}, ASKED
    ),
    "OpenAI's names under its keys": (
        {"messages": [{"from": "user", "value": "q"}, {"from": "Assistant", "value": "a"}]}, ASKED
    ),
    "Gemma's name": ({"messages": [Q, {"role": "model", "content": "a"}]}, ASKED),
    "a developer": ({"messages": [{"role": "developer", "content": "Be brief."}, Q, A]}, [BRIEF, *ASKED]),
    "an observation": (
        {"messages": [Q, {"from": "observation", "value": "7"}, A]}, [ASKED[0], ("tool", "7"), ASKED[1]]
    ),
    "a column system": ({"system": "Be brief.", "conversations": TALK}, [BRIEF, *ASKED]),
    "a system twice, the same": ({"system": "Be brief.", "messages": [{"from": "system", "value": "Be brief."}, Q, A]},
                                 [BRIEF, *ASKED]),
    "no system": ({"system": "", "messages": [Q, A]}, ASKED),
    "Alpaca with system and history": (
        {"system": "Be brief.", "history": [["p", "b"]], "instruction": "q", "output": "a"},
        [BRIEF, ("user", "p"), ("assistant", "b"), *ASKED],
    ),
    "history in JSON": ({"history": '[["p", "b"]]', "instruction": "q", "output": "a"},
                        [("user", "p"), ("assistant", "b"), *ASKED]),
    "prompt and completion": ({"prompt": "q", "completion": "a"}, ASKED),
    "both as messages": ({"prompt": [Q], "completion": [A]}, ASKED),
    "the prompt as messages": ({"prompt": [Q], "completion": "a"}, ASKED),
    "the completion as messages": ({"prompt": "q", "completion": [A]}, ASKED),
    "parts": ({"messages": [{"role": "user", "content": [{"type": "text", "text": "q"}]},
                            {"role": "assistant", "content": [{"type": "output_text", "text": "a"}]}]}, ASKED),
    "two parts": ({"messages": [{"role": "user", "content": [{"type": "text", "text": t} for t in "qr"]}, A]},
                  [("user", "q\nr"), ASKED[1]]),
    "a prompt beside messages": ({"prompt": "q", "messages": [Q, A], "chosen": [A], "rejected": [A]}, ASKED),
    "text": ({"text": "The tide."}, [("assistant", "The tide.")]),
}  # fmt: skip


@pytest.mark.parametrize("name", FORMS)
def test_forms_of_rows(name):
    fields, expected = FORMS[name]
    assert said(fields) == expected


def test_only_the_completion_of_a_prompt_is_learned():
    fields = {"prompt": [Q, A, Q], "completion": [A]}
    assert [m.get("train", True) for m in read(fields).messages] == [False, False, False, True]


CALLS = {
    "ShareGPT": {"from": "function_call", "value": json.dumps(CALL)},
    "ShareGPT, several": {"from": "function_call", "value": json.dumps([CALL])},
    "OpenAI": {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": CALL}]},
    "OpenAI before": {"role": "assistant", "content": None, "function_call": CALL},
    "in JSON": {"role": "assistant", "tool_calls": json.dumps([{"type": "function", "function": CALL}])},
}


@pytest.mark.parametrize("name", CALLS)
def test_forms_of_calls(name):
    message = read({"messages": [Q, CALLS[name], A]}).messages[1]
    assert message["role"] == "assistant" and [call["function"] for call in message["tool_calls"]] == [CALL]


@pytest.mark.parametrize("spell", [lambda t: [t], lambda t: json.dumps([t]), lambda t: [json.dumps(t)]])
def test_tools_are_taken_with_every_form(spell):
    tool = {"type": "function", "function": {"name": "act"}}
    for row in ({"messages": [Q, A]}, {"instruction": "q", "output": "a"}, {"prompt": "q", "completion": "a"}):
        assert read(row | {"tools": spell(tool)}).tools == [tool]
    assert all(read({"messages": [Q, A], "tools": none}).tools is None for none in (None, "", [], "[]"))


REFUSED = {
    # falsy values are values
    "output 0": ({"instruction": "q", "output": 0}, "'output' is int"),
    "output false": ({"instruction": "q", "output": False}, "'output' is bool"),
    "output []": ({"instruction": "q", "output": []}, "'output' is list"),
    "output {}": ({"instruction": "q", "output": {}}, "'output' is dict"),
    "output 0.0": ({"instruction": "q", "output": 0.0}, "'output' is float"),
    "instruction 0": ({"instruction": 0, "output": "a"}, "'instruction' is int"),
    "input 0": ({"instruction": "q", "input": 0, "output": "a"}, "'input' is int"),
    "input false": ({"instruction": "q", "input": False, "output": "a"}, "'input' is bool"),
    "input []": ({"instruction": "q", "input": [], "output": "a"}, "'input' is list"),
    "system 0": ({"system": 0, "messages": [Q, A]}, "'system' is int"),
    "system []": ({"system": [], "messages": [Q, A]}, "'system' is list"),
    "tools 0": ({"tools": 0, "messages": [Q, A]}, "expected tools"),
    "tools {}": ({"tools": {}, "messages": [Q, A]}, "expected tools"),
    "messages 0": ({"messages": 0}, "'messages': expected a list"),
    "messages []": ({"messages": []}, "'messages': expected a list"),
    "messages false": ({"messages": False}, "'messages': expected a list"),
    "content 0": ({"messages": [Q, A | {"content": 0}]}, "message 2: expected", "content as int"),
    "content []": ({"messages": [Q, A | {"content": [0]}]}, "message 2:", "part of type int"),
    "content {}": ({"messages": [Q, A | {"content": {}}]}, "message 2:", "content as dict"),
    "train 0": ({"messages": [Q, A | {"train": 0}]}, "message 2:", "train"),
    "tool_calls 0": ({"messages": [Q, A | {"tool_calls": 0}]}, "message 2:", "tool_calls"),
    "history 0": ({"history": 0, "instruction": "q", "output": "a"}, "'history'"),
    # who speaks
    "an unknown role": ({"messages": [Q, A | {"role": "oracle"}]}, "message 2: the role 'oracle' is not known"),
    "an unknown speaker": ({"conversations": [TALK[0], {"from": "bing", "value": "a"}]}, "'conversations'", "'bing'"),
    "a role of blanks": ({"messages": [Q, A | {"role": " "}]}, "the role ' ' is not known"),
    "no role": ({"messages": [Q, {"content": "a"}]}, "message 2:", '"role": text'),
    "a role that is no text": ({"messages": [Q, A | {"role": 1}]}, "role as int"),
    "two roles": ({"messages": [Q, A | {"from": "human"}]}, "'role' and 'from' differ"),
    "two contents": ({"messages": [Q, A | {"value": "b"}]}, "'content' and 'value' differ"),
    "two systems": ({"system": "x", "messages": [{"role": "system", "content": "y"}, Q, A]}, "differ"),
    "a message that is text": ({"messages": ["q", "a"]}, "message 1:", "found str"),
    "columns of messages": ({"messages": {"role": ["user"], "content": ["q"]}}, "expected a list of messages"),
    # what a field holds
    "null": ({"instruction": None, "output": "a"}, "'instruction' is null (found: instruction, output)"),
    "Python's spelling": ({"messages": "[{'role': 'user'}]"}, "the field 'messages' is text", "Python's own spelling"),
    "tools in Python": ({"messages": [Q, A], "tools": "[{'type': 'function'}]"}, "the field 'tools'", "Python"),
    "broken JSON": ({"messages": '[{"role": "user"'}, "the field 'messages' is text, not JSON: Expecting"),
    "history of three": ({"history": [["a", "b", "c"]], "instruction": "q", "output": "a"}, "[question, answer]"),
    "history of messages": ({"history": [Q, A], "instruction": "q", "output": "a"}, "[question, answer]"),
    "an image": ({"messages": [Q | {"content": [{"type": "image_url", "image_url": "x"}]}, A]}, "type image_url"),
    "a part without text": ({"messages": [Q | {"content": [{"type": "text"}]}, A]}, "part of type text"),
    "arguments that are no JSON": (
        {"messages": [Q, A | {"tool_calls": [{"function": {"name": "act", "arguments": "x=1"}}]}]},
        "the field 'arguments' is text, not JSON",
    ),
    "arguments in Python": (
        {"messages": [Q, A | {"tool_calls": [{"function": {"name": "act", "arguments": "{'x': 1}"}}]}]}, "Python's own"
    ),
    "arguments that are a list": (
        {"messages": [Q, A | {"tool_calls": [{"function": {"name": "act", "arguments": [1]}}]}]}, "arguments as list"
    ),
    "a call without a name": ({"messages": [Q, A | {"tool_calls": [{"function": {}}]}]}, "expected tool_calls"),
    "a call that is text": ({"conversations": [TALK[0], {"from": "function_call", "value": "act()"}]}, "not JSON"),
    "nan": ({"messages": [Q, A], "tools": [{"function": {"name": "act", "default": float("nan")}}]}, "JSON"),
    # data of another kind
    "a preference": ({"prompt": "q", "chosen": "a", "rejected": "b"}, "preference", "'chosen' and 'rejected'"),
    "a preference of messages": ({"chosen": [Q, A], "rejected": [Q, A]}, "preference"),
    "a judgment": ({"prompt": "q", "completion": "a", "label": False}, "judged answer", "'label'"),
    "a prompt alone": ({"prompt": "q"}, "'instruction' is missing (found: prompt)"),
    "other columns": ({"question": "q", "answer": "a"}, "(found: question, answer); name yours"),
    "nothing": ({}, "(found: nothing)"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refused_by_name(name):
    fields, *words = REFUSED[name]
    with pytest.raises(BadRow) as error:
        read(fields)
    assert "\n" not in str(error.value) and all(word in str(error.value) for word in ("r.jsonl: line 1", *words))


def test_a_preference_is_refused_whatever_the_columns():
    with pytest.raises(BadRow, match="preference"):
        read({"prompt": "q", "chosen": "a", "rejected": "b"}, ColumnArgs("prompt", "input", "chosen"))
    assert said({"prompt": "q", "chosen": "a"}, ColumnArgs("prompt", "input", "chosen")) == ASKED


def test_empty_answers_among_others_are_counted_and_not_learned():
    empty = {"role": "assistant", "content": " "}
    conversation = read({"messages": [Q, empty, Q, A, Q, empty]})
    assert conversation.empty_answers == 2
    assert [m.get("train", True) for m in conversation.messages] == [True, False, True, True, True, False]
    acts = {"role": "assistant", "content": "", "tool_calls": [{"function": CALL}]}
    thinks = {"role": "assistant", "content": "", "reasoning_content": "Hm."}
    assert read({"messages": [Q, acts, Q, thinks]}).empty_answers == 0


def test_nulls_that_arrow_fills_in_are_left_out_and_counted():
    call = {"function": {"name": "act", "arguments": {"x": 0, "text": None}, "description": None}}
    schema = {"function": {"name": "act", "parameters": {"x": {"type": "integer"}, "text": None}}}
    row = {"messages": [Q, {"role": "assistant", "content": "", "tool_calls": [call]}], "tools": [schema]}
    conversation = read(row, filled=True)
    assert conversation.messages[1]["tool_calls"] == [{"function": {"name": "act", "arguments": {"x": 0}}}]
    assert conversation.tools == [{"function": {"name": "act", "parameters": {"x": {"type": "integer"}}}}]
    assert conversation.nulls == 3
    assert read(row).messages[1]["tool_calls"] == [call] and read(row).nulls == 0  # JSON's own nulls are values


def test_parquet_gives_what_its_source_did(tmp_path):
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    calls = [{"name": "move", "arguments": {"x": 0}}, {"name": "say", "arguments": {"text": "hi"}}]
    rows = [
        {"messages": [Q, {"role": "assistant", "content": "", "tool_calls": [{"function": call}]}]} for call in calls
    ]
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "r.parquet")
    read_back = [to_conversation(row, COLUMNS) for row in Source(str(tmp_path / "r.parquet")).rows()]
    assert [c.messages for c in read_back] == [read(row).messages for row in rows]
    assert [c.nulls for c in read_back] == [1, 1]


def test_fields_that_are_not_used_are_named():
    assert read({"messages": [Q, A], "id": 7, "note": None, "tag": ""}).unused == ["id"]
    assert read({"instruction": "q", "output": "a", "text": "qa", "source": "x"}).unused == ["text", "source"]
    assert read({"text": "The tide.", "url": "x"}).unused == ["url"]


# --- files


def test_an_unclosed_quote_names_the_line_where_it_opens(tmp_path):
    start = "instruction,output\n"
    for text, line in (
        (start + 'a,b\nc,"d\ne,f\ng,h\n', 3),
        (start + 'a,"b\nc"\ne,"f\ng,h\ni,j\n', 4),  # after a field of two lines
        (start + 'a,"b\nc,"d"\n', 2),
        (start + '"a"b,c\nd,e\n', 2),
        (start + '"two\r\nlines","unclosed\r\nc,d\r\n', 3),  # in the second line of its row
    ):
        with pytest.raises(UserError, match=rf"r.csv: line {line}: not CSV: a quote opens here"):
            read_file(tmp_path / "r.csv", text)


def test_columns_of_one_name_are_refused(tmp_path):
    with pytest.raises(UserError, match="line 1: two columns are named 'output'"):
        read_file(tmp_path / "r.csv", "instruction,output,output\na,b,c\n")
    rows = read_file(tmp_path / "r.csv", "instruction,output,,\na,b,,\nc,d,x,\n")  # as spreadsheets end a table
    assert rows[0].fields == {"instruction": "a", "output": "b", "": ""} and "without a name" in rows[1].problem


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("instruction;output\na;b, c\n", "semicolons"),
        ("instruction\toutput\na\tb, c\n", "tabs"),
        ("sep=;\r\ninstruction;output\r\na;b, c\r\n", "semicolons"),
        ('\ufeffinstruction;output\n"a";"b, c"\n', "semicolons"),
        ('instruction,output\na,"b, c"\n', None),
        ('"instruction","output"\n\na,"b, c"\n', None),
    ],
)
def test_what_lies_between_columns_is_found_and_said(tmp_path, capsys, text, named):
    rows = read_file(tmp_path / "r.csv", text)
    assert [row.fields for row in rows] == [{"instruction": "a", "output": "b, c"}]
    told = capsys.readouterr().err
    assert (f"columns lie between {named}" in told) if named else not told


def test_rows_of_another_length_are_refused(tmp_path):
    rows = read_file(tmp_path / "r.csv", 'a,b\n1\n1,2,3\n"1\n2",3\n1,2\n')
    assert [row.where.rpartition(" ")[2] for row in rows] == ["2", "3", "4", "6"]
    assert ["expected 2 columns" in row.problem for row in rows] == [True, True, False, False]


LATIN = "\u00e4".encode("latin-1")


@pytest.mark.parametrize(
    ("name", "contents", "line"),
    [
        ("r.csv", b"instruction,output\na,b\nc," + LATIN + b"\n", 3),
        ("r.json", b'[{"instruction": "a"},\n{"instruction": "' + LATIN + b'"}]', 2),
        ("r.jsonl", b'{"instruction": "a"}\n{"instruction": "' + LATIN + b'"}', 2),
        ("r.csv", "instruction,output\n".encode("utf-16"), 1),
        ("r.json", "[]".encode("utf-16"), 1),
        ("r.jsonl", "{}".encode("utf-16"), 1),
    ],
)
def test_text_that_is_not_utf8_names_the_line_and_what_to_do(tmp_path, name, contents, line):
    try:
        told = next(row.where + ": " + row.problem for row in read_file(tmp_path / name, contents) if row.problem)
    except UserError as error:
        told = str(error)
    assert f"line {line}" in told and "save the file as UTF-8" in told
    assert ("UTF-16" in told) == (line == 1)


HUGE = "7" * 5000
BAD_JSON = {
    "a huge number": (f'{{"instruction": "a", "id": {HUGE}}}', "thousands of digits"),
    "a field twice": ('{"output": "a", "output": "b"}', "'output' stands twice"),
    "a field twice, within": ('{"messages": [{"role": "user", "role": "user"}]}', "'role' stands twice"),
    "too deep": ("[" * 100_000, "nested too deeply"),
    "two objects": ('{"a": 1}{"a": 2}', "not JSON: Extra data"),
    "Python's": ("{'a': 1}", "not JSON"),
    "a comma after the last": ('{"a": 1,}', "not JSON"),
    "a value": ("7", "expected an object, found int"),
    "null": ("null", "expected an object, found NoneType"),
    "a bare tab": ('{"a": "\t"}', "Invalid control character"),
}


@pytest.mark.parametrize("name", BAD_JSON)
def test_json_is_read_strictly(tmp_path, name):
    text, words = BAD_JSON[name]
    (row,) = read_file(tmp_path / "r.jsonl", text + "\n")
    assert words in row.problem and row.where.endswith("line 1")
    try:
        told = read_file(tmp_path / "r.json", f"[{text}]")[0].problem
    except UserError as error:
        told = str(error)
    assert name in ("two objects",) or words.removeprefix("not JSON: ") in told, told


@pytest.mark.parametrize("more", ["[]", '[{"a": 2}]', "x", '{"a": 2}', "]"])
def test_what_follows_a_list_is_refused(tmp_path, more):
    with pytest.raises(UserError, match="line 2: not JSON: something follows the list"):
        read_file(tmp_path / "r.json", f'[{{"a": 1}}]\n{more}')


def test_a_list_in_a_file_of_lines_is_pointed_to_its_own_kind(tmp_path):
    assert "goes into a .json file" in read_file(tmp_path / "r.jsonl", '[\n{"a": 1}\n]\n')[0].problem


def test_a_text_file_is_pointed_to_rows(tmp_path):
    with pytest.raises(UserError, match=r'r.txt: a text has no rows; write a .jsonl file.*\{"text"'):
        read_file(tmp_path / "r.txt", "The tide.")


@pytest.mark.parametrize("name", ["R.JSONL", "r.Json", "r.CSV", "r.tsv"])
def test_kinds_of_files_by_any_spelling(tmp_path, name):
    text = {"R.JSONL": '{"a": "1"}', "r.Json": '[{"a": "1"}]'}.get(
        name, "a\tb\n1\t\n" if name == "r.tsv" else "a,b\n1,\n"
    )
    assert read_file(tmp_path / name, text)[0].fields["a"] == "1"


def test_names_with_commas_and_weights(tmp_path, monkeypatch):
    from lit_gpt.data.sources import parse_sources

    monkeypatch.setenv("HOME", str(tmp_path))
    odd, plain = write_rows(tmp_path / "a,b.jsonl"), write_rows(tmp_path / "c.jsonl")
    assert parse_sources(f"{odd}=0.5,{plain}") == [Source(str(odd), 0.5), Source(str(plain))]
    assert parse_sources(f"{plain}=2, {odd}") == [Source(str(plain), 2.0), Source(str(odd))]
    assert parse_sources("~/c.jsonl=2,~/a,b.jsonl") == [Source(str(plain), 2.0), Source(str(odd))]
