"""Thoughts, tools and tool calls of conversations, rendered by templates in the forms of Qwen3, Llama 3.1 and SmolLM3, and
by a ChatML that has none of them. What is learned is written out beside each by hand.
"""

import dataclasses
import json

import datasets
import numpy as np
import pytest
from test_chat import learned_by, said_by, wrap_tokenizer

from kdlib.align import boundaries
from kdlib.data import chat, dataset, records, tokenize, windowing
from kdlib.data.records import Fields

QWEN3 = r"""
{%- if tools %}
    {{- '<|im_start|>system\n' }}
    {%- if messages[0].role == 'system' %}
        {{- messages[0].content + '\n\n' }}
    {%- endif %}
    {{- "# Tools\n\n<tools>" }}
    {%- for tool in tools %}
        {{- "\n" }}
        {{- tool | tojson }}
    {%- endfor %}
    {{- "\n</tools><|im_end|>\n" }}
{%- elif messages[0].role == 'system' %}
    {{- '<|im_start|>system\n' + messages[0].content + '<|im_end|>\n' }}
{%- endif %}
{%- set ns = namespace(searching=true, last_query=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- if ns.searching and message.role == "user" %}
        {%- set ns.searching = false %}
        {%- set ns.last_query = messages|length - 1 - loop.index0 %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- set content = message.content if message.content is string else '' %}
    {%- if message.role == "user" or (message.role == "system" and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\n' + content + '<|im_end|>' + '\n' }}
    {%- elif message.role == "assistant" %}
        {%- set thought = message.reasoning_content if message.reasoning_content is string else '' %}
        {%- if loop.index0 > ns.last_query and (loop.last or thought) %}
            {{- '<|im_start|>assistant\n<think>\n' + thought.strip('\n') + '\n</think>\n\n' + content.lstrip('\n') }}
        {%- else %}
            {{- '<|im_start|>assistant\n' + content }}
        {%- endif %}
        {%- for tool_call in message.tool_calls or [] %}
            {%- if (loop.first and content) or not loop.first %}
                {{- '\n' }}
            {%- endif %}
            {%- if tool_call.function %}
                {%- set tool_call = tool_call.function %}
            {%- endif %}
            {{- '<tool_call>\n{"name": "' + tool_call.name + '", "arguments": ' }}
            {{- tool_call.arguments if tool_call.arguments is string else tool_call.arguments | tojson }}
            {{- '}\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\n' }}
    {%- elif message.role == "tool" %}
        {%- if loop.first or messages[loop.index0 - 1].role != "tool" %}
            {{- '<|im_start|>user' }}
        {%- endif %}
        {{- '\n<tool_response>\n' + content + '\n</tool_response>' }}
        {%- if loop.last or messages[loop.index0 + 1].role != "tool" %}
            {{- '<|im_end|>\n' }}
        {%- endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\n\n</think>\n\n' }}
    {%- endif %}
{%- endif %}"""
LLAMA31 = r"""
{{- bos_token }}
{%- set date = date_string if date_string is defined else strftime_now("%d %b %Y") %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\n\n" }}
{%- if tools %}
    {{- "Environment: ipython\n" }}
{%- endif %}
{{- "Today Date: " + date + "\n\n" + system_message + "<|eot_id|>" }}
{%- if tools %}
    {%- set first_user_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
    {{- '<|start_header_id|>user<|end_header_id|>\n\nGiven the following functions:\n\n' }}
    {%- for t in tools %}
        {{- t | tojson(indent=4) + "\n\n" }}
    {%- endfor %}
    {{- first_user_message + "<|eot_id|>" }}
{%- endif %}
{%- for message in messages %}
    {%- if not (message.role == 'tool' or 'tool_calls' in message) %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'+ message['content'] | trim + '<|eot_id|>' }}
    {%- elif 'tool_calls' in message %}
        {%- if not message.tool_calls|length == 1 %}
            {{- raise_exception("This model only supports single tool-calls at once!") }}
        {%- endif %}
        {%- set tool_call = message.tool_calls[0].function %}
        {{- '<|start_header_id|>assistant<|end_header_id|>\n\n{"name": "' + tool_call.name + '", "parameters": ' }}
        {{- tool_call.arguments | tojson + "}<|eot_id|>" }}
    {%- else %}
        {{- "<|start_header_id|>ipython<|end_header_id|>\n\n" }}
        {%- if message.content is mapping or message.content is iterable %}
            {{- message.content | tojson }}
        {%- else %}
            {{- message.content }}
        {%- endif %}
        {{- "<|eot_id|>" }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}
{%- endif %}"""
SMOLLM3 = r"""
{%- set thinks = enable_thinking is not defined or enable_thinking %}
{{- "<|im_start|>system\n## Metadata\n\nToday Date: " + strftime_now("%d %B %Y") + "\nReasoning Mode: " }}
{{- ("/think" if thinks else "/no_think") + "\n\n" }}
{%- if tools %}
    {{- "### Tools\n\n<tools>\n" }}
    {%- for tool in tools %}
        {{- (tool | string) + "\n" }}
    {%- endfor %}
    {{- "</tools>\n" }}
{%- endif %}
{{- "<|im_end|>\n" }}
{%- for message in messages if message.role != "system" %}
    {%- if message.role == "assistant" %}
        {%- generation %}
        {{- "<|im_start|>assistant\n" + ("" if thinks else "<think>\n\n</think>\n") + message.content.lstrip("\n") }}
        {{- "<|im_end|>\n" }}
        {%- endgeneration %}
    {%- else %}
        {{- "<|im_start|>" + ("user" if message.role == "tool" else message.role) + "\n" + message.content }}
        {{- "<|im_end|>\n" }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- "<|im_start|>assistant\n" }}
{%- endif %}"""
CHATML = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
MISTRAL = (  # roles alternate, apart from tool calls and their results
    "{% set ns = namespace(index=0) %}{% for m in messages %}"
    "{% if m.role == 'user' or (m.role == 'assistant' and m.tool_calls is not defined) %}"
    "{% if (m.role == 'user') != (ns.index % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% set ns.index = ns.index + 1 %}{% endif %}{% endfor %}{{ bos_token }}{% for m in messages %}"
    "{% if m.role == 'user' %}[INST] {{ m.content }}[/INST]{% elif m.tool_calls is defined %}[TOOL_CALLS] "
    "{{ m.tool_calls | tojson }}{{ eos_token }}{% elif m.role == 'tool' %}[TOOL_RESULTS] {{ m.content }}[/TOOL_RESULTS]"
    "{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)
TEMPLATES = {
    "Qwen3": (QWEN3, ["<|im_start|>", "<|im_end|>"], ["<think>", "</think>", "<tool_call>", "</tool_call>"]),
    "Llama 3.1": (LLAMA31, ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"], []),
    "SmolLM3": (SMOLLM3, ["<|im_start|>", "<|im_end|>"], ["<think>", "</think>"]),
    "ChatML": (CHATML, ["<|im_start|>", "<|im_end|>"], []),
    "Mistral": (MISTRAL, ["[INST]", "[/INST]", "[TOOL_CALLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]"], []),
    "none": (None, [], []),
}
DATE = chat.Rendering(date="2026-02-03")
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {"a": {}}}}}
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": "the cat", "b": [2]}}, "id": "call12345"}
QUESTION = {"role": "user", "content": "Where is the cat?"}
CALLING = {"role": "assistant", "content": "", "tool_calls": [CALL]}
RESULT = {"role": "tool", "content": "the mat", "tool_call_id": "call12345", "name": "add"}
ANSWER = {"role": "assistant", "content": "The mat."}
THOUGHT = {"reasoning_content": "the cat sat"}
THINKING_CALL = {**CALLING, **THOUGHT}
AGAIN = [{"role": "user", "content": "And the dog?"}, {"role": "assistant", "content": "a"}]
CALL_TEXT = '{"a": "the cat", "b": [2]}'
QWEN_CALL = f'<tool_call>\n{{"name": "add", "arguments": {CALL_TEXT}}}\n</tool_call>'
LLAMA_CALL = f'{{"name": "add", "parameters": {CALL_TEXT}}}<|eot_id|>'
ONCE = [QUESTION, CALLING, RESULT, ANSWER]
# messages, tools; by template: the learned stretches, and what is left out
CASES = {
    "a thought": ([QUESTION, {**ANSWER, **THOUGHT}], [], {
        "Qwen3": (["<think>\nthe cat sat\n</think>\n\nThe mat.<|im_end|>"], []),
        "Llama 3.1": (["The mat.<|eot_id|>"], ["reasoning_content"]),
        "SmolLM3": (["The mat.<|im_end|>"], ["reasoning_content"]),
        "ChatML": (["The mat.<|im_end|>"], ["reasoning_content"]),
        "none": ([" The mat.</s>"], ["reasoning_content"]),
    }),
    "an earlier thought": ([QUESTION, {**ANSWER, **THOUGHT}, AGAIN[0], {**AGAIN[1], **THOUGHT}], [], {
        "Qwen3": (["The mat.<|im_end|>", "<think>\nthe cat sat\n</think>\n\na<|im_end|>"], []),
    }),
    "a call, its result and an answer": (ONCE, [TOOL], {
        "Qwen3": ([f"{QWEN_CALL}<|im_end|>", "The mat.<|im_end|>"], ["name", "tool_call_id"]),
        "Llama 3.1": ([LLAMA_CALL, "The mat.<|eot_id|>"], ["name", "tool_call_id"]),
        "SmolLM3": (["The mat.<|im_end|>"], ["tool_calls", "name", "tool_call_id"]),
        "ChatML": (["The mat.<|im_end|>"], ["tool_calls", "name", "tool_call_id", "tools"]),
        "Mistral": ([f"[TOOL_CALLS] {json.dumps([CALL])}</s>", " The mat.</s>"], ["name", "tool_call_id", "tools"]),
        "none": ([" The mat.</s>"], ["tool_calls", "name", "tool_call_id", "tools"]),
    }),
    "calls in earlier turns": ([QUESTION, THINKING_CALL, RESULT, CALLING, RESULT, {**ANSWER, **THOUGHT}, *AGAIN], [], {
        "Qwen3": (
            [f"{QWEN_CALL}<|im_end|>", f"{QWEN_CALL}<|im_end|>", "The mat.<|im_end|>", "a<|im_end|>"],
            ["reasoning_content", "name", "tool_call_id"],
        ),
        "Llama 3.1": (
            [LLAMA_CALL, LLAMA_CALL, "The mat.<|eot_id|>", "a<|eot_id|>"], ["reasoning_content", "name", "tool_call_id"],
        ),
    }),
    "thoughts, contents and several calls": (
        [QUESTION, {**THINKING_CALL, "content": "a", "tool_calls": [CALL] * 2}, RESULT, RESULT, {**ANSWER, **THOUGHT}],
        [TOOL, TOOL], {
            "Qwen3": (
                [f"<think>\nthe cat sat\n</think>\n\na\n{QWEN_CALL}\n{QWEN_CALL}<|im_end|>",
                 "<think>\nthe cat sat\n</think>\n\nThe mat.<|im_end|>"], ["name", "tool_call_id"],
            ),
        },
    ),
    "thoughts before a call": ([QUESTION, THINKING_CALL, RESULT, ANSWER], [TOOL], {
        "Qwen3": (
            [f"<think>\nthe cat sat\n</think>\n\n{QWEN_CALL}<|im_end|>", "The mat.<|im_end|>"], ["name", "tool_call_id"],
        ),
    }),
    "a call at the end": ([QUESTION, ANSWER, AGAIN[0], CALLING], [TOOL], {
        "Qwen3": (["The mat.<|im_end|>", f"{QWEN_CALL}<|im_end|>"], []),
        "Llama 3.1": (["The mat.<|eot_id|>", LLAMA_CALL], []),
        "SmolLM3": (["The mat.<|im_end|>"], ["tool_calls"]),
    }),
    "a content that the template drops beside a call": (
        [QUESTION, {**CALLING, "content": "I add."}, RESULT, ANSWER], [TOOL], {
            "Qwen3": ([f"I add.\n{QWEN_CALL}<|im_end|>", "The mat.<|im_end|>"], ["name", "tool_call_id"]),
            "Llama 3.1": (
                [LLAMA_CALL, "The mat.<|eot_id|>"],
                ["name", "tool_call_id", "the content of messages with tool_calls"],
            ),
        },
    ),
    "a result that is JSON": ([QUESTION, CALLING, {**RESULT, "content": '{"a": "😀"}\n'}, ANSWER], [TOOL], {
        "Qwen3": ([f"{QWEN_CALL}<|im_end|>", "The mat.<|im_end|>"], ["name", "tool_call_id"]),
        "Llama 3.1": ([LLAMA_CALL, "The mat.<|eot_id|>"], ["name", "tool_call_id"]),
    }),
}  # fmt: skip
RUNS = [(name, case) for case, (_, _, results) in CASES.items() for name in results]


def reader_of(name, base="byte_level"):
    return wrap_tokenizer(*TEMPLATES[name], base)


def document_of(messages, tools=()):
    return records.to_document({"messages": list(messages), "tools": list(tools)}, Fields(), "a.jsonl line 1")[1]


@pytest.mark.parametrize(("name", "case"), RUNS)
def test_ids_are_the_templates_and_what_the_model_writes_is_learned(name, case):
    messages, tools, results = CASES[case]
    reader, document = reader_of(name), document_of(messages, tools)
    encoded = tokenize.encode(document, reader, DATE)
    if reader.tokenizer.chat_template:
        text = reader.tokenizer.apply_chat_template(messages, tools=tools or None, tokenize=False)
        today, fixed = chat.Rendering(date=chat.clock.today()), chat.locate_contents(document, reader.tokenizer, DATE)
        assert chat.locate_contents(document, reader.tokenizer, today).text == text
        assert encoded.ids.tolist() == reader.tokenizer(fixed.text, add_special_tokens=False)["input_ids"]
    learned, left_out = results[name]
    assert learned_by(encoded, reader) == learned
    assert list(encoded.left_out) == left_out
    assert document.left_out == ()
    assert name in ("none", "Mistral") or not (encoded.is_text & ~encoded.faithful).any()  # these begin with a space
    shared = b"".join(b"\0" + part.text.encode() for part in chat._parts(turns_of(document)))
    for token, end, length in zip(
        said_by(encoded.ids[encoded.is_text], reader), encoded.ends[encoded.is_text], encoded.lengths[encoded.is_text],
        strict=True,
    ):  # fmt: skip
        assert shared[end - length : end] == token[len(token) - length :]


def turns_of(document):
    extras = document.extras or ({},) * len(document.messages)
    return [
        {"role": role, "content": content, **more}
        for (role, content), more in zip(document.messages, extras, strict=True)
    ]


def test_thoughts_may_be_masked():
    for case in ("a thought", "thoughts, contents and several calls"):
        messages, tools, results = CASES[case]
        reader, document = reader_of("Qwen3"), document_of(messages, tools)
        learning, masking = (
            tokenize.encode(document, reader, chat.Rendering(learn_thinking=on)) for on in (True, False)
        )
        assert learned_by(learning, reader) == results["Qwen3"][0]
        wanted = [stretch.split("</think>\n\n")[-1] for stretch in results["Qwen3"][0]]
        assert learned_by(masking, reader) == wanted
        for name in ("ids", "ends", "is_text", "faithful"):
            np.testing.assert_array_equal(getattr(learning, name), getattr(masking, name))


def test_thoughts_are_aligned_and_tool_calls_are_not():
    messages, tools, _ = CASES["thoughts before a call"]
    document = document_of(messages, tools)
    readers = reader_of("Qwen3"), reader_of("Qwen3", "unigram")
    sides = [tokenize.encode(document, reader) for reader in readers]
    pairs = boundaries.align(*sides)
    following = sides[0].ids[pairs.student[pairs.usable] + 1]
    text = b"".join(said_by(following, readers[0])).decode()
    assert "sat" in text and "tool" not in text and "arguments" not in text
    (window,) = windowing.cut_windows(document, *sides, *readers, 1000)
    assert 0 < window.num_bytes <= len("the cat satThe mat.")
    assert (window.student_labels != windowing.IGNORE).sum() > window.num_bytes / 3


def test_a_thought_that_a_template_changes_is_rejected():
    template = QWEN3.replace("thought.strip('\\n')", "thought | upper")
    assert template != QWEN3
    reader = wrap_tokenizer(template, *TEMPLATES["Qwen3"][1:], "byte_level")
    with pytest.raises(chat.RejectedConversation, match="drops or changes an assistant message"):
        tokenize.encode(document_of([QUESTION, {**ANSWER, **THOUGHT}]), reader)


def test_results_of_tools_may_be_dropped_and_are_counted():
    template = CHATML.replace("messages %}", "messages if m.role != 'tool' %}")
    reader = wrap_tokenizer(template, *TEMPLATES["ChatML"][1:], "byte_level")
    encoded = tokenize.encode(document_of(ONCE), reader)
    assert encoded.left_out == ("tool_calls", "name", "tool_call_id", "results of tools")
    assert learned_by(encoded, reader) == ["The mat.<|im_end|>"]


@pytest.mark.parametrize("edge", ["start", "end"])
def test_calls_that_cannot_be_located_are_no_targets_and_counted(edge):
    """The text before or after the turns depends on the number of messages with calls."""
    count = "{{ (messages | selectattr('tool_calls', 'defined') | list | length) }}"
    template = count + QWEN3 if edge == "start" else QWEN3 + count
    reader = wrap_tokenizer(template, *TEMPLATES["Qwen3"][1:], "byte_level")
    encoded = tokenize.encode(document_of(ONCE), reader)
    assert "tool_calls as training targets" in encoded.left_out
    assert learned_by(encoded, reader) == ["The mat.<|im_end|>"]


@pytest.mark.parametrize("alias", chat.THOUGHTS)
def test_a_template_reads_thoughts_under_its_own_name(alias):
    reader = wrap_tokenizer(QWEN3.replace("reasoning_content", alias), *TEMPLATES["Qwen3"][1:], "byte_level")
    encoded = tokenize.encode(document_of([QUESTION, {**ANSWER, **THOUGHT}]), reader)
    assert learned_by(encoded, reader) == CASES["a thought"][2]["Qwen3"][0]


def test_answers_in_the_prompt_have_no_targets():
    messages, _, _ = CASES["calls in earlier turns"]
    reader, document = reader_of("Qwen3"), document_of(messages)
    encoded = tokenize.encode(dataclasses.replace(document, prompt_length=4), reader)
    assert learned_by(encoded, reader) == ["The mat.<|im_end|>", "a<|im_end|>"]


# ------------------------------------------------------------------ records


def test_fields_are_read_in_their_usual_forms():
    function = {"name": "add", "arguments": json.dumps({"a": None})}
    forms = [[{"id": "x", "function": function, "type": "function"}], [{**function, "id": "x"}]]
    for calls in (*forms, *map(json.dumps, forms)):
        row = {
            "messages": [QUESTION, {"role": "assistant", "content": None, "tool_calls": calls}],
            "tools": json.dumps([TOOL]),
        }
        document = records.to_document(row, Fields(), "a")[1]
        wanted = {"id": "x", "type": "function", "function": {"name": "add", "arguments": {"a": None}}}
        assert document.extras == ({}, {"tool_calls": [wanted]})
        assert (document.messages[1], document.tools) == (("assistant", ""), (TOOL,))
    for name in records.THOUGHT_FIELDS:
        document = document_of([QUESTION, {**ANSWER, name: "hm", "tool_calls": None, "name": ""}])
        assert (document.extras, document.left_out) == (({}, {"reasoning_content": "hm"}), ())
    both = document_of([QUESTION, {**ANSWER, "reasoning_content": "hm", "thinking": "oh", "reasoning": 3}])
    assert both.extras[1] == {"reasoning_content": "hm"}
    assert both.left_out == ("the message field thinking", "the message field reasoning")
    assert document_of([QUESTION, ANSWER]).extras == ()


def test_nulls_that_a_table_adds_are_removed():
    rows = [{"messages": [QUESTION, {**CALLING, "tool_calls": [
        {"function": {"name": "add", "arguments": arguments}, "type": "function", "id": None}]}], "tools": [TOOL]}
        for arguments in ({"a": 1}, {"b": [{"c": None}]})]  # fmt: skip
    document = records.to_document(datasets.Dataset.from_list(rows)[1], Fields(), "a")[1]
    assert document.extras[1]["tool_calls"] == [
        {"type": "function", "function": {"name": "add", "arguments": {"b": [{}]}}}
    ]


@pytest.mark.parametrize("tools", ["add(a, b)", {"name": "add"}, ["add"], 3])
def test_tools_that_are_no_schemas_are_left_out(tools):
    document = records.to_document({"messages": [QUESTION, ANSWER], "tools": tools}, Fields(), "a")[1]
    assert (document.tools, document.left_out) == ((), ("tools",))


def test_thoughts_and_tools_are_part_of_the_content():
    documents = [document_of([QUESTION, ANSWER]), document_of([QUESTION, {**ANSWER, **THOUGHT}]), document_of(ONCE),
                 document_of(ONCE, [TOOL])]  # fmt: skip
    assert len({document.key for document in documents}) == 4
    assert documents[0].key == records.Document("", documents[0].messages).key
    with pytest.raises(records.UnusableRecord, match="lone surrogate"):
        document_of([QUESTION, {**ANSWER, "thinking": "\ud800"}])
    system = document_of([{"role": "system", "content": "x", "name": "n"}, QUESTION, {**ANSWER, **THOUGHT}])
    assert records.merge_system(system).extras == ({}, THOUGHT)


def test_windows_name_what_each_side_leaves_out(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    documents = [
        document_of([QUESTION, ANSWER]),
        document_of(ONCE, [TOOL]),
        document_of([QUESTION, {**ANSWER, **THOUGHT}]),
    ]
    readers = reader_of("ChatML"), reader_of("Qwen3")
    for _ in range(2):  # also from the cache
        windows = dataset.build_windows(documents, *readers, 400, DATE)
        assert len(windows) == 3
        assert windows.left_out == {
            1: [
                f"{part} (not in the student's chat template)"
                for part in ("tool_calls", "name", "tool_call_id", "tools")
            ]
            + [f"{part} (not in the teacher's chat template)" for part in ("name", "tool_call_id")],
            2: ["reasoning_content (not in the student's chat template)"],
        }
    encoded = [tokenize.encode(documents[1], reader, DATE) for reader in readers]
    (window,) = windowing.cut_windows(documents[1], *encoded, *readers, 400, 1)
    np.testing.assert_array_equal(windows[1].teacher_ids, window.teacher_ids)
    for changed in (
        documents[1],
        dataclasses.replace(documents[1], tools=()),
        dataclasses.replace(documents[1], extras=()),
    ):
        found = dataset.build_windows([changed], *readers, 400, DATE)
        wanted = tokenize.encode(changed, readers[1], DATE)
        np.testing.assert_array_equal(found[0].teacher_ids, wanted.ids)
