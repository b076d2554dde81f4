"""Conversations through chat templates of every form: the template's own ids, answers and their ends learned, contents
aligned. What is expected is written out beside each template by hand.
"""

import copy
import dataclasses
import functools
import itertools
import json

import numpy as np
import pytest
import tokenizers
import torch
from families import FAMILIES, tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st

from kdlib import clock, demo
from kdlib.align import boundaries, vocab
from kdlib.config import Config
from kdlib.data import chat, corpus, tokenize, windowing
from kdlib.data.corpus import Document
from kdlib.evaluation import internals
from kdlib.models import devices
from kdlib.models.head import Head
from kdlib.training import loop
from kdlib.training.objective import Objective

TEXT = [
    "The cat sat on the mat,\n\nand the dog looked at the cat. user assistant system a b",
    "Answer: yes\n\n\nWhere is the cat? The answer is: a cat.\n\nuser\nassistant\n",
    "[INST] the cat [/INST] Return the list </s> x y z 😀 Question 0\n\n  the  mat",
] * 6

# ------------------------------------------------------------------ templates, and what they write, piece by piece
# A piece is (kind, text): a mark "m", a content "c", an answer "a", the end of an answer's turn "e".


def _is_answer(role):
    return role == "assistant"


def _piece(role, content):
    """A content; one that is blank is not text."""
    return ("a" if _is_answer(role) else "c") if content.strip() else "m", content


def _end(role, text, behind=""):
    return [("e" if _is_answer(role) else "m", text), ("m", behind)]


CHATML = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"


def chatml(messages):
    for role, content in messages:
        yield from [("m", f"<|im_start|>{role}\n"), _piece(role, content), *_end(role, "<|im_end|>", "\n")]


LLAMA3 = (
    "{{ '<|bot|>' }}{% for m in messages %}<|head|>{{ m['role'] }}<|/head|>\n\n"
    "{{ m['content'] | trim }}<|eot|>{% endfor %}"
)


def llama3(messages):
    yield "m", "<|bot|>"
    for role, content in messages:
        yield from [("m", f"<|head|>{role}<|/head|>\n\n"), _piece(role, content.strip()), *_end(role, "<|eot|>")]


GEMMA = (
    "<bos>{% if messages[0].role == 'system' %}{{ raise_exception('no system\nrole here') }}{% endif %}"
    "{% for m in messages %}"
    "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}"
    "<turn>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content | trim }}</turn>\n{% endfor %}"
)


def gemma(messages):
    yield "m", "<bos>"
    for role, content in messages:
        name = "model" if _is_answer(role) else role
        yield from [("m", f"<turn>{name}\n"), _piece(role, content.strip()), *_end(role, "</turn>", "\n")]


MERGING = (
    "<bos>{% set first = messages[0].content + '\n\n' if messages[0].role == 'system' else '' %}"
    "{% for m in messages if m.role != 'system' %}<turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
    "{{ first if loop.first }}{{ m.content | trim }}</turn>\n{% endfor %}"
)


def merging(messages):
    system = [content for role, content in messages if role == "system"]
    yield "m", "<bos>"
    for place, (role, content) in enumerate(turn for turn in messages if turn[0] != "system"):
        yield "m", f"<turn>{'model' if _is_answer(role) else role}\n"
        if system and not place:
            yield from [_piece("system", system[0]), ("m", "\n\n")]
        yield from [_piece(role, content.strip()), *_end(role, "</turn>", "\n")]


LLAMA2 = (
    "{% set system = messages[0].content if messages[0].role == 'system' else none %}"
    "{% for m in messages if m.role != 'system' %}{% if m.role == 'user' %}{{ bos_token }}[INST] "
    "{% if loop.first and system is not none %}<<SYS>>\n{{ system }}\n<</SYS>>\n\n{% endif %}{{ m.content.strip() }} [/INST]"
    "{% else %} {{ m.content.strip() }} {{ eos_token }}{% endif %}{% endfor %}"
)


def llama2(messages):
    system = [content for role, content in messages if role == "system"]
    for place, (role, content) in enumerate(turn for turn in messages if turn[0] != "system"):
        if _is_answer(role):
            yield from [("m", " "), _piece(role, content.strip()), ("e", " </s>")]
            continue
        yield "m", "<s>[INST] "
        if system and not place:
            yield from [("m", "<<SYS>>\n"), _piece("system", system[0]), ("m", "\n<</SYS>>\n\n")]
        yield from [_piece(role, content.strip()), ("m", " [/INST]")]


MISTRAL = (  # the system message goes in front of the last question
    "{% set system = messages[0].content if messages[0].role == 'system' else '' %}"
    "{% set turns = messages[1:] if messages[0].role == 'system' else messages %}{{ bos_token }}{% for m in turns %}"
    "{% if m.role == 'user' %}[INST]{% if system and loop.index > loop.length - 2 %}{{ system + '\n\n' }}{% endif %}"
    "{{ m.content }}[/INST]{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)


def mistral(messages):
    system = [content for role, content in messages if role == "system"]
    turns = [turn for turn in messages if turn[0] != "system"]
    yield "m", "<s>"
    for place, (role, content) in enumerate(turns):
        if _is_answer(role):
            yield from [("m", " "), _piece(role, content), ("e", "</s>")]
            continue
        yield "m", "[INST]"
        if system and system[0] and place > len(turns) - 3:
            yield from [_piece("system", system[0]) if len(turns) < 4 else ("m", system[0]), ("m", "\n\n")]
        yield from [_piece(role, content), ("m", "[/INST]")]


PHI3 = "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}<|endoftext|>"


def phi3(messages):
    for place, (role, content) in enumerate(messages):
        yield from [("m", f"<|{role}|>\n"), _piece(role, content), *_end(role, "<|end|>")]
        last = place == len(messages) - 1
        yield "e" if last and _is_answer(role) else "m", "\n<|endoftext|>" if last else "\n"


ZEPHYR = "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + eos_token }}\n{% endfor %}"


def zephyr(messages):
    for role, content in messages:
        yield from [("m", f"<|{role}|>\n"), _piece(role, content), *_end(role, "</s>", "\n")]


QWEN3 = (
    "{% set ns = namespace(last=0) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}"
    "{% endif %}{% endfor %}{% for m in messages %}<|im_start|>{{ m.role }}\n{% set c = m.content %}"
    "{% if m.role == 'assistant' %}{% set thought = '' %}{% if '</think>' in c %}"
    "{% set thought = c.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}"
    "{% set c = c.split('</think>')[-1].lstrip('\n') %}{% endif %}"
    "{% if loop.index0 > ns.last and (loop.last or thought) %}<think>\n{{ thought.strip('\n') }}\n</think>\n\n"
    "{{ c.lstrip('\n') }}{% else %}{{ c }}{% endif %}{% else %}{{ c }}{% endif %}<|im_end|>\n{% endfor %}"
)


def qwen3(messages):
    last = max(place for place, (role, _) in enumerate(messages) if role == "user")
    for place, (role, content) in enumerate(messages):
        yield "m", f"<|im_start|>{role}\n"
        if _is_answer(role) and place > last and place == len(messages) - 1 and "</think>" not in content:
            yield "m", "<think>\n\n</think>\n\n"
            content = content.lstrip("\n")
        elif _is_answer(role) and place < last:
            content = content.split("</think>\n\n")[-1]
        yield from [_piece(role, content), *_end(role, "<|im_end|>", "\n")]


DEEPSEEK = (
    "<｜begin▁of▁sentence｜>{% for m in messages %}{% if m.role == 'system' %}{{ m.content }}{% elif m.role == 'user' %}"
    "<｜User｜>{{ m.content }}{% else %}<｜Assistant｜>{{ m.content.split('</think>')[-1] }}<｜end▁of▁sentence｜>{% endif %}"
    "{% endfor %}"
)


def deepseek(messages):
    yield "m", "<｜begin▁of▁sentence｜>"
    for role, content in messages:
        if _is_answer(role):
            yield "m", "<｜Assistant｜>"
            kept = content.split("</think>")[-1]
            yield from [_piece(role, kept), ("e", "<｜end▁of▁sentence｜>")]
        else:
            yield from [("m", "" if role == "system" else "<｜User｜>"), _piece(role, content)]


GRANITE = (
    "{% for m in messages %}<|start_of_role|>{{ m.role }}<|end_of_role|>{{ m.content }}<|end_of_text|>\n{% endfor %}"
)


def granite(messages):
    for role, content in messages:
        mark = f"<|start_of_role|>{role}<|end_of_role|>"
        yield from [("m", mark), _piece(role, content), *_end(role, "<|end_of_text|>", "\n")]


SMOLLM3 = (
    "{% set own = messages[0].content.rstrip() if messages[0].role == 'system' else '' %}<|im_start|>system\n## Metadata\n\n"
    "Date: today\n\n## Instructions\n\n{{ own or 'You are helpful.' }}<|im_end|>\n"
    "{% for m in messages if m.role != 'system' %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' %}<think>\n\n</think>\n{{ m.content.lstrip('\n') }}{% else %}{{ m.content }}{% endif %}"
    "<|im_end|>\n{% endfor %}"
)


def smollm3(messages):
    system = [content.rstrip() for role, content in messages if role == "system" and content.strip()]
    yield "m", "<|im_start|>system\n## Metadata\n\nDate: today\n\n## Instructions\n\n"
    yield ("c", system[0]) if system else ("m", "You are helpful.")
    yield "m", "<|im_end|>\n"
    for role, content in (turn for turn in messages if turn[0] != "system"):
        yield "m", f"<|im_start|>{role}\n" + ("<think>\n\n</think>\n" if _is_answer(role) else "")
        kept = content.lstrip("\n") if _is_answer(role) else content
        yield from [_piece(role, kept), *_end(role, "<|im_end|>", "\n")]


TRIMMING = (  # words for marks; the mark of an end is an added token, but no special one
    "{% for m in messages %}### {{ m.role | capitalize }}:\n{{ m.content | trim }}"
    "{{ '<|stop|>' if m.role == 'assistant' }}\n\n{% endfor %}"
)


def trimming(messages):
    for role, content in messages:
        yield from [("m", f"### {role.capitalize()}:\n"), _piece(role, content.strip())]
        yield from _end(role, "<|stop|>" if _is_answer(role) else "", "\n\n")


ENDLESS = "{% for m in messages %}{{ m.role | upper }}: {{ m.content }}\n{% endfor %}"


def endless(messages):
    for role, content in messages:
        yield from [("m", f"{role.upper()}: "), _piece(role, content), ("m", "\n")]


def plain(messages):
    """The form of a tokenizer that has no template; both tokenizers end a text with their own mark."""
    for role, content in messages:
        yield from [("m", f"{role.capitalize()}: "), _piece(role, content.strip())]
        yield from _end(role, EOS if _is_answer(role) else "", "\n")


EOS = "</s>"
TEMPLATES = {
    "ChatML": (CHATML, chatml, ["<|im_start|>", "<|im_end|>"], []),
    "Llama 3": (LLAMA3, llama3, ["<|bot|>", "<|head|>", "<|/head|>", "<|eot|>"], []),
    "Gemma": (GEMMA, gemma, ["<bos>", "<turn>", "</turn>"], []),
    "merging": (MERGING, merging, ["<bos>", "<turn>", "</turn>"], []),
    "Llama 2": (LLAMA2, llama2, [], []),
    "Mistral": (MISTRAL, mistral, [], []),
    "Mistral with tokens": (MISTRAL, mistral, ["[INST]", "[/INST]"], []),
    "Phi-3": (PHI3, phi3, ["<|user|>", "<|assistant|>", "<|system|>", "<|end|>", "<|endoftext|>"], []),
    "Zephyr": (ZEPHYR, zephyr, [], []),
    "Qwen3": (QWEN3, qwen3, ["<|im_start|>", "<|im_end|>"], ["<think>", "</think>"]),
    "DeepSeek": (
        DEEPSEEK, deepseek, ["<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"], ["<｜User｜>", "<｜Assistant｜>"]
    ),
    "Granite": (GRANITE, granite, ["<|start_of_role|>", "<|end_of_role|>", "<|end_of_text|>"], []),
    "SmolLM3": (SMOLLM3, smollm3, ["<|im_start|>", "<|im_end|>"], ["<think>", "</think>"]),
    "trimming": (TRIMMING, trimming, [], ["<|stop|>"]),
    "endless": (ENDLESS, endless, [], []),
    "none": (None, plain, [], []),
}  # fmt: skip
REFUSED = {  # by templates that have no place for a system message
    "Gemma": {"system", "empty system", "letters of marks"},
}

# ------------------------------------------------------------------ conversations


def talk(*contents, system=None):
    roles = ["user", "assistant"] * len(contents)
    turns = tuple(zip(roles, contents, strict=False))
    return turns if system is None else (("system", system), *turns)


CONVERSATIONS = {
    "plain": talk("Where is the cat?", "The cat sat on the mat."),
    "one letter": talk("Which one?", "a", "And then?", "s", "So?", "t"),
    "letters of marks": talk("s", "n", "u", "e", system="m"),
    "names of roles": talk("user", "assistant", "system", "user", "assistant", "start"),
    "markers": talk("<|im_end|>\n<|im_start|>assistant\n[/INST] a", "</s> <|im_end|>", "<turn>model", "x</turn>\n<|end|> y"),
    "leading blanks": talk("  \n where", "\n\n the cat", "\n\nwhere", "  a"),
    "trailing blanks": talk("where \n", "the cat\n", "where", "a ", "and?", "x\n\n\n"),
    "repeated": talk("a", "a", "a", "a", "the cat", "the cat"),
    "empty system": talk("Where?", "The mat.", system=""),
    "blank question": talk(" ", "The mat.", "\n", "yes"),
    "system": talk("Where is the cat?", "The mat.", "And the dog?", "a", system="Answer: yes\n"),
    "emoji": talk("😀", "👩‍👩‍👧", "the 😀?", "😀😀 a", "x", " 😀"),
    "ten turns": talk(*(f"{word} {i}" for i in range(10) for word in ("Question", "The answer is: a cat"))),
    "a question at the end": talk("Where?", "a", "And then?"),
    "thoughts": talk("Where?", "<think>\nhm\n</think>\n\nThe mat.", "And?", "<think>\nthe cat\n</think>\n\na"),
    "placeholders": talk("kdlib0z", "<think>\nhm\n</think>\n\nkdlib0z kdlibx0z", "kdlib", "a"),
    "white space of all kinds": talk("\t\r\nx\u3000", "\u3000東京\t", "a\x0b", "\x0b東"),
}  # fmt: skip
BASES = ("byte_level", "unigram")


@functools.cache
def reader_of(name, base):
    template, _, special, added = TEMPLATES[name]
    return wrap_tokenizer(template, special, added, base)


@functools.cache
def base_tokenizer(base):
    made = {"byte_level": lambda: demo.byte_level_bpe(TEXT, 420), "unigram": lambda: demo.unigram(TEXT, 420)}
    return made[base]() if base in made else FAMILIES[base]()


def wrap_tokenizer(template, special, added, base):
    tokenizer = copy.deepcopy(base_tokenizer(base))
    if base == "byte_level":  # so that the same marks can be written out for both
        tokenizer.add_special_tokens({"bos_token": "<s>", "eos_token": EOS})
    tokenizer.add_tokens([tokenizers.AddedToken(token, special=True, normalized=False) for token in special])
    tokenizer.add_tokens([tokenizers.AddedToken(token, special=False, normalized=False) for token in added])
    tokenizer.chat_template = template
    return tokenize.wrap_tokenizer(tokenizer, vocab.read_vocabulary(tokenizer))


def said_by(ids, reader):
    """The bytes of each token, those of special tokens too."""
    names = reader.tokenizer.added_tokens_decoder
    return [names[i].content.encode() if i in names else reader.vocabulary.tokens[i] for i in map(int, ids)]


def edges_of(ids, text, reader):
    """Bytes of the text before each token and after the last, `[tokens + 1]`; the tokens must say exactly the text, but for
    the space that SentencePiece puts in front of it.
    """
    said = b"".join(said_by(ids, reader))
    extra = len(said) - len(text.encode())
    assert said == b" " * extra + text.encode()
    assert extra <= reader.vocabulary.adds_space
    return np.maximum(np.cumsum([0, *map(len, said_by(ids, reader))]) - extra, 0)


def turns_of(messages):
    return [{"role": role, "content": content} for role, content in messages]


def template_ids(messages, reader):
    return list(reader.tokenizer.apply_chat_template(turns_of(messages), tokenize=True, return_dict=False))


def shared_bytes(messages):
    """The contents as both sides count them."""
    return b"".join(b"\0" + content.encode() for _, content in messages)


def is_torn(edges, pieces, text):
    """Whether a token reaches over the edge of a content, but for blanks in front of one."""
    stops = np.cumsum([0, *(len(part.encode()) for _, part in pieces)])
    for (kind, part), start, stop in zip(pieces, stops, stops[1:], strict=False):
        low = edges[edges <= start].max()
        if kind in "ca" and part and (stop not in edges or text.encode()[low:start].strip()):
            return True
    return False


def check(encoded, messages, pieces, reader):
    """Compare what was made of a conversation with what the template writes, token by token."""
    text = "".join(part for _, part in pieces)
    kinds = np.array([kind for kind, part in pieces for _ in part.encode()])
    edges = edges_of(encoded.ids, text, reader)
    if reader.tokenizer.chat_template:
        assert reader.tokenizer.apply_chat_template(turns_of(messages), tokenize=False) == text  # rightly written out
        ids = template_ids(messages, reader)
    else:
        ids = reader.tokenizer(text, add_special_tokens=False)["input_ids"]
    assert encoded.ids.tolist() == ids or is_torn(edges_of(ids, text, reader), pieces, text)
    said, shared = said_by(encoded.ids, reader), shared_bytes(messages)
    last = np.where(np.diff(edges) > 0, kinds[edges[1:] - 1], "")  # of which kind the token's last byte is
    real = last != ""  # no mere space in front of a text
    assert (encoded.learn == np.isin(last, ["a", "e"]))[real].all()
    assert (encoded.is_text == np.isin(last, ["c", "a"]))[real].all()
    assert encoded.boundary[:-1][encoded.is_text[1:] & ~encoded.is_text[:-1]].all()
    special = reader.special_ids[0]
    exact = not np.isin(encoded.ids[encoded.is_text], list(special)).any()  # else split characters are not counted
    for i in np.flatnonzero(real):
        end, length, within = encoded.ends[i], encoded.lengths[i], np.isin(kinds[edges[i] : edges[i + 1]], ["c", "a"])
        wanted = encoded.is_text[i] and within.all() and encoded.ids[i] not in special
        assert encoded.faithful[i] == wanted if exact else encoded.faithful[i] <= wanted
        assert length == (within.sum() if encoded.is_text[i] else 0) or not exact
        if encoded.is_text[i] and (exact or encoded.faithful[i]):
            assert shared[end - length : end] == said[i][len(said[i]) - length :]
        elif encoded.boundary[i] and exact:  # it has read up to the first byte of a content
            assert shared[end : end + encoded.lengths[i + 1]] == said[i + 1][-encoded.lengths[i + 1] :]


CASES = [(name, each) for name in TEMPLATES for each in CONVERSATIONS if each not in REFUSED.get(name, ())]


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize(("name", "conversation"), CASES)
def test_ids_are_the_templates_and_answers_and_their_ends_are_learned(name, conversation, base):
    reader, messages = reader_of(name, base), CONVERSATIONS[conversation]
    check(tokenize.encode(Document("", messages), reader), messages, list(TEMPLATES[name][1](messages)), reader)


@pytest.mark.parametrize("conversation", CONVERSATIONS)
def test_two_templates_are_aligned_on_contents_only(conversation):
    """Each template beside ChatML, which keeps contents, and Llama 3, which trims them."""
    messages = CONVERSATIONS[conversation]
    document, shared = Document("", messages), shared_bytes(messages)
    coded = {
        (name, base): tokenize.encode(document, reader_of(name, base))
        for name in TEMPLATES if conversation not in REFUSED.get(name, ()) for base in BASES
    }  # fmt: skip
    for (name, base), other in itertools.product(coded, ("ChatML", "Llama 3")):
        readers, sides = (
            (reader_of(name, base), reader_of(other, "byte_level")),
            (coded[name, base], coded[other, "byte_level"]),
        )
        pairs = boundaries.align(*sides)
        for side, reader, places in zip(sides, readers, (pairs.student, pairs.teacher), strict=True):
            following = places[pairs.usable] + 1
            assert side.is_text[following].all()
            for token, end, place in zip(
                said_by(side.ids[following], reader), pairs.ends[pairs.usable], following, strict=True
            ):
                assert shared.startswith(token[len(token) - side.lengths[place] :], end)
        (window,) = windowing.cut_windows(document, *sides, *readers, 10_000)
        assert window.num_bytes <= sum(len(content.encode()) for role, content in messages if role == "assistant")
        scored = window.student_scored, window.teacher_scored
        for side, rows, reader in zip(sides, scored, readers, strict=True):
            lengths = np.concatenate([np.zeros(len(reader.prefix_of(document)), int), side.lengths])
            assert np.append(lengths[1:], 0)[rows].sum() == window.num_bytes


def test_what_one_template_trims_leaves_the_rest_of_the_conversation_to_compare():
    ours, theirs = reader_of("Llama 3", "byte_level"), reader_of("ChatML", "unigram")
    document = Document("", talk("Where?", "\n\nThe cat sat.\n", "And?", "The mat, the cat."))
    sides = [tokenize.encode(document, reader) for reader in (ours, theirs)]
    (window,) = windowing.cut_windows(document, *sides, ours, theirs, 400)
    assert len("The mat, the cat.") < window.num_bytes <= len("The cat sat.The mat, the cat.")


@pytest.mark.parametrize("name", [name for name in TEMPLATES if name != "none"])
def test_a_window_is_what_the_template_renders_and_nothing_else(name):
    """No second BOS, no EOS; a limit counts nothing else."""
    document = Document("", CONVERSATIONS["plain"])
    for base in BASES:
        ours, theirs = reader_of(name, base), reader_of(name, "unigram")
        sides = [tokenize.encode(document, reader) for reader in (ours, theirs)]
        wanted = [template_ids(document.messages, reader) for reader in (ours, theirs)]
        (window,) = windowing.cut_windows(document, *sides, ours, theirs, 400)
        assert [window.student_ids.tolist(), window.teacher_ids.tolist()] == wanted
        (window,) = windowing.cut_windows(document, *sides, ours, dataclasses.replace(theirs, context=11), 12)
        assert [window.student_ids.tolist(), window.teacher_ids.tolist()] == [wanted[0][:12], wanted[1][:11]]


def test_a_conversation_without_a_template_has_the_tokenizers_own_beginning():
    reader, document = reader_of("none", "unigram"), Document("", CONVERSATIONS["plain"])
    encoded = tokenize.encode(document, reader)
    (window,) = windowing.cut_windows(document, encoded, encoded, reader, reader, 400)
    assert reader.prefix
    assert window.student_ids.tolist() == [*reader.prefix, *encoded.ids]


# ------------------------------------------------------------------ text that a content is cut out of


def test_a_content_that_tokens_reach_out_of_is_tokenized_by_itself():
    """Line breaks of template and content that make one token; the other contents are tokenized as ever."""
    messages = talk("The cat\n", "\n\nThe cat", "Where?", "x\n")
    template = "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}\n{% endfor %}"
    for base in BASES:
        reader = wrap_tokenizer(template, ["<|user|>", "<|assistant|>"], [], base)
        pieces = [
            ("m", "<|user|>\n"), ("c", "The cat\n"), ("m", "\n<|assistant|>\n"), ("a", "\n\nThe cat"), ("m", "\n<|user|>\n"),
            ("c", "Where?"), ("m", "\n<|assistant|>\n"), ("a", "x\n"), ("m", "\n"),
        ]  # fmt: skip
        encoded = tokenize.encode(Document("", messages), reader)
        check(encoded, messages, pieces, reader)
        assert encoded.ids.tolist() != template_ids(messages, reader)


@pytest.mark.parametrize("base", [*BASES, "sentencepiece_bpe"])
def test_a_piece_of_a_text_gets_no_space_in_front(base):
    reader = wrap_tokenizer("{% for m in messages %}{{ m.content }}{% endfor %}", [], [], base)
    messages = talk("the c", "at the", "the", "s>x", " ", "x", "\nthe", ".a", "xthe", "\n\n")[:-1]
    encoded = tokenize.encode(Document("", messages), reader)
    said = b"".join(said_by(encoded.ids, reader))
    assert said.removeprefix(b" ") == "".join(content for _, content in messages).encode()
    contents = [content for _, content in messages if content.strip()]
    assert encoded.lengths[encoded.is_text].sum() == len("".join(contents))


def learned_by(encoded, reader):
    """The learned stretches of a conversation as the tokenizer decodes them."""
    edges = np.flatnonzero(np.diff(encoded.learn, prepend=False, append=False))
    stretches = (encoded.ids[start:stop] for start, stop in edges.reshape(-1, 2))
    return [reader.tokenizer.decode(ids, clean_up_tokenization_spaces=False) for ids in stretches]


def test_marks_may_take_in_the_blanks_around_them():
    """As Phi-3's do: the line break behind `<|end|>` belongs to no turn, and blanks of an answer stay the answer's."""
    template = "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>{{ '\n' if not loop.last }}{% endfor %}"
    tokenizer = wrap_tokenizer(template, [], [], "byte_level").tokenizer
    names = "<|user|>", "<|assistant|>", "<|end|>"
    tokenizer.add_tokens([tokenizers.AddedToken(name, special=True, normalized=False, rstrip=True) for name in names])
    reader = tokenize.wrap_tokenizer(tokenizer, vocab.read_vocabulary(tokenizer))
    messages = talk("Where?", "the mat", "And?", "a")
    encoded = tokenize.encode(Document("", messages), reader)
    assert encoded.ids.tolist() == template_ids(messages, reader)
    assert learned_by(encoded, reader) == ["the mat<|end|>", "a<|end|>"]
    encoded = tokenize.encode(Document("", talk("Where?", "\n the mat", "And?", "a \n")), reader)
    assert learned_by(encoded, reader) == ["\n the mat<|end|>", "a \n<|end|>"]
    assert encoded.lengths[encoded.learn].sum() == len("\n the mata \n")


def test_unknown_text_behind_an_answer_is_no_end_mark():
    reader = wrap_tokenizer("{% for m in messages %}{{ m.content }} \u2603 {% endfor %}", [], [], "word_piece")
    assert reader.tokenizer("\u2603", add_special_tokens=False)["input_ids"] == [reader.tokenizer.unk_token_id]
    encoded = tokenize.encode(Document("", talk("The dog", "the cat")), reader)
    assert [part.replace(" ", "") for part in learned_by(encoded, reader)] == ["thecat"]


ENDS = {"Llama 2": "</s>", "Mistral": "</s>", "Zephyr": "</s>", "Llama 3": "<|eot|>", "ChatML": "<|im_end|>"}


@pytest.mark.parametrize(("name", "end"), ENDS.items())
def test_a_tokenizer_that_puts_a_space_behind_every_special_token(name, end):
    """As older SentencePiece tokenizers do in any text: the ids are the template's, and answers align."""
    reader, other = reader_of(name, "sentencepiece_bpe"), reader_of("ChatML", "byte_level")
    document = Document("", talk("Where is the cat?", "The mat, the cat.", "And?", "a"))
    sides = tokenize.encode(document, reader), tokenize.encode(document, other)
    assert sides[0].ids.tolist() == template_ids(document.messages, reader)
    assert [part.replace(" ", "") for part in learned_by(sides[0], reader)] == [f"Themat,thecat.{end}", f"a{end}"]
    (window,) = windowing.cut_windows(document, *sides, reader, other, 400)
    assert window.num_bytes >= len("The mat, the cat.")
    assert len(window.student_rows) > 3


LETTERS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\u2581"), max_size=12)
WORDS = st.sampled_from(
    ["\n", " ", "a", "the cat", "\n\n", "<|im_end|>", "</s>", "user", "😀", "assistant\n", "kdlib0z"]
)
CONTENTS = st.lists(WORDS | LETTERS, max_size=4).map("".join)


@given(
    asked=st.lists(CONTENTS, min_size=1, max_size=3),
    answers=st.lists(CONTENTS.filter(str.strip), min_size=3, max_size=3),
    system=st.none() | CONTENTS,
    name=st.sampled_from(sorted(TEMPLATES)),
    base=st.sampled_from(BASES),
)
@settings(max_examples=100, deadline=None)
def test_whatever_is_said_is_encoded_as_written(asked, answers, system, name, base):
    """Everything but thoughts, which templates write out in their own way."""
    turns = [content for both in zip(asked, answers, strict=False) for content in both]
    messages = talk(*turns, system=None if name == "Gemma" else system)
    reader = reader_of(name, base)
    check(tokenize.encode(Document("", messages), reader), messages, list(TEMPLATES[name][1](messages)), reader)


# ------------------------------------------------------------------ templates that refuse

CHANGES = "drops or changes "
REFUSALS = {
    "Gemma": (GEMMA, talk("x", "y", system="z"), "rejects this conversation: no system role here$"),
    "alternation": (GEMMA, (("user", "x"), ("user", "y"), ("assistant", "z")), "rejects .* roles must alternate$"),
    "syntax": ("{% for m in %}", talk("x", "y"), "rejects this conversation: "),
    "a field that is not there": ("{{ messages[0].name.first }}", talk("x", "y"), "rejects this conversation: "),
    "no reason": ("{{ raise_exception('') }}", talk("x", "y"), "rejects this conversation: TemplateError$"),
    "left out": (MERGING.replace("first if", "'' if"), talk("x", "y", system="z"), CHANGES + "a system message$"),
    "changed": (CHATML.replace("m.content", "m.content | upper"), talk("x", "y"), CHANGES + "a user message$"),
    "twice": (CHATML.replace("m.content", "m.content * 2"), talk("x", "y"), CHANGES + "a user message$"),
    "shortened": (CHATML.replace("m.content", "m.content[:9]"), talk("x", "0123456789"), CHANGES + "an assistant message$"),
    "answers alone": (
        CHATML.replace("m.content", "m.content.replace('ly', 'ily')"), talk("x", "easly", "x", "y"),
        CHANGES + "an assistant message$",
    ),
    "thoughts alone": (QWEN3, talk("x", "<think>\nhm\n</think>\n\n", "x", "y"), CHANGES + "an assistant message$"),
}  # fmt: skip


@pytest.mark.parametrize("why", REFUSALS)
def test_a_conversation_that_a_template_does_not_take_is_named_in_one_line(why):
    template, messages, reason = REFUSALS[why]
    reader = wrap_tokenizer(template, ["<|im_start|>", "<|im_end|>"], [], "byte_level")
    with pytest.raises(ValueError, match="^chat.jsonl record 24: the chat template of .*" + reason) as refused:
        tokenize.encode(Document("", messages, "chat.jsonl record 24"), reader)
    assert "\n" not in str(refused.value)
    assert refused.value.__suppress_context__
    with pytest.raises(ValueError, match=r"^the chat template of "):
        tokenize.encode(Document("", messages), reader)


def test_the_record_of_a_file_is_named_and_is_no_part_of_its_content(tmp_path):
    rows = [{"text": "x"}, {"messages": turns_of(talk(" ", "y", system=""))}, {"messages": turns_of(talk("x", "y"))}]
    (tmp_path / "chat.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    _, blank, plain = corpus.read_documents(str(tmp_path / "chat.jsonl"))
    assert plain == Document("", talk("x", "y"))
    assert plain.key == Document("", talk("x", "y")).key
    assert blank.messages == talk(" ", "y", system="")
    with pytest.raises(
        ValueError, match=rf"^{tmp_path}/chat.jsonl line 2: .* rejects this conversation: no system role here$"
    ):
        tokenize.encode(blank, reader_of("Gemma", "unigram"))
    (tmp_path / "chat.jsonl").write_text(json.dumps({"messages": turns_of(talk("x", " "))}))
    with pytest.raises(ValueError, match=r"1 with a blank answer \(first: .*chat.jsonl line 1\)"):
        corpus.read_documents(str(tmp_path / "chat.jsonl"))


def test_the_ordinary_case_takes_two_renderings(monkeypatch):
    rendered = []
    for name in TEMPLATES:
        tokenizer = copy.deepcopy(reader_of(name, "byte_level").tokenizer)
        real = tokenizer.apply_chat_template
        monkeypatch.setattr(
            tokenizer, "apply_chat_template", lambda *given, real=real, **how: rendered.append(1) or real(*given, **how)
        )
        chat.locate_contents(Document("", CONVERSATIONS["ten turns"]), tokenizer)
    assert len(rendered) == 2 * (len(TEMPLATES) - 1)


# ------------------------------------------------------------------ arguments and dates of templates

LLAMA31 = (  # date and knowledge cutoff in the system message, as in Llama 3.1
    "{% if not date_string is defined %}{% if strftime_now is defined %}{% set date_string = strftime_now('%d %b %Y') %}"
    "{% else %}{% set date_string = '26 Jul 2024' %}{% endif %}{% endif %}{{ '<|bot|>' }}<|head|>system<|/head|>\n\n"
    "Today Date: {{ date_string }}\n\n<|eot|>" + LLAMA3.removeprefix("{{ '<|bot|>' }}")
)
SWITCHED = CHATML + "{% if enable_thinking is defined and enable_thinking is false %}no thoughts{% endif %}"


@pytest.mark.parametrize(
    ("rendering", "date"),
    [
        (chat.Rendering(date="2026-02-03"), "03 Feb 2026"),
        (chat.Rendering((("date_string", "1 Jan 1999"),), "2026-02-03"), "1 Jan 1999"),
    ],
)
def test_a_template_prints_the_date_of_the_run(rendering, date):
    reader = wrap_tokenizer(LLAMA31, TEMPLATES["Llama 3"][2], [], "byte_level")
    document = Document("", CONVERSATIONS["plain"])
    ids = tokenize.encode(document, reader, rendering).ids
    wanted = reader.tokenizer.apply_chat_template(
        turns_of(document.messages), tokenize=True, return_dict=False, date_string=date
    )
    assert ids.tolist() == wanted
    assert f"Today Date: {date}" in reader.tokenizer.decode(ids)


@pytest.mark.parametrize("start", ["", "\n", "  {% if true %}x{% endif %}\n", "\n\n {{ 'x' }} "])
def test_a_fixed_date_changes_nothing_else(start):
    template = (
        start + "{{ strftime_now('%d.%m.%Y %A %-d %j %% at') }}{% if strftime_now is defined %}!{% endif %}" + CHATML
    )
    tokenizer = wrap_tokenizer(template, [], [], "byte_level").tokenizer
    document = Document("", CONVERSATIONS["plain"])
    text = chat.locate_contents(document, tokenizer, chat.Rendering(date=clock.today())).text
    assert text == tokenizer.apply_chat_template(turns_of(CONVERSATIONS["plain"]), tokenize=False)


def test_a_template_gets_its_arguments():
    config = Config(template_kwargs="enable_thinking=false, note=a, b", template_date="2026-02-03")
    rendering = chat.Rendering.of(config)
    assert rendering == chat.Rendering((("enable_thinking", False), ("note", "a, b")), "2026-02-03")
    reader = wrap_tokenizer(SWITCHED, ["<|im_start|>", "<|im_end|>"], [], "byte_level")
    document = Document("", CONVERSATIONS["plain"])
    with_it, without = (tokenize.encode(document, reader, each).ids for each in (rendering, chat.Rendering()))
    assert reader.tokenizer.decode(with_it[len(without) :]) == "no thoughts"
    assert chat.Rendering.of(Config()).date == clock.today()


def test_only_templates_that_print_it_depend_on_the_date():
    dated, plain = (wrap_tokenizer(template, [], [], "byte_level").tokenizer for template in (LLAMA31, CHATML))
    first, second = chat.Rendering(date="2026-02-03"), chat.Rendering(date="2026-02-04")
    assert first.key_for(dated) != second.key_for(dated)
    assert first.key_for(plain) == second.key_for(plain) != chat.Rendering((("a", 1),), "2026-02-03").key_for(plain)
    assert chat.prints_date(dated) and not chat.prints_date(plain)


# ------------------------------------------------------------------ windows that are shown


def test_the_pieces_of_a_conversation_begin_with_what_its_template_writes():
    """Without the BOS that the tokenizer would put there, where the template puts it too, and without the last EOS."""
    for name, begins in (("Llama 2", "["), ("ChatML", "")):
        ours, theirs = reader_of(name, "unigram"), reader_of("ChatML", "byte_level")
        document = Document("", CONVERSATIONS["plain"])
        sides = [tokenize.encode(document, reader) for reader in (ours, theirs)]
        (window,) = windowing.cut_windows(document, *sides, ours, theirs, 400)
        shown = [token for span in internals.spans(window, ours, theirs) for token in span["student"]]
        left_out = 2 if name == "Llama 2" else 0
        assert len(shown) == len(window.student_ids) - left_out
        assert shown[0].strip() == begins


# ------------------------------------------------------------------ a student that stops


@pytest.mark.parametrize("base", BASES)
def test_a_student_of_one_letter_answers_writes_the_letter_and_stops(base):
    reader = reader_of("ChatML", base)
    letters = {"the cat": "a", "the dog": "s", "the mat": "t"}
    documents = [Document("", talk(f"Where is {word}?", letter)) for word, letter in letters.items()]
    windows = []
    for number, document in enumerate(documents):
        encoded = tokenize.encode(document, reader)
        windows += windowing.cut_windows(document, encoded, encoded, reader, reader, 100, number)
    model = tiny_model(reader.tokenizer, 32)
    config = Config(kd_method="none", lm_weight=1.0, batch_size=3, learning_rate=1e-2, max_length=100, use_ema=False)
    objective = Objective(model, Head(model, reader.vocabulary), config)
    machine = devices.accelerator("fp32")
    for _ in loop.TrainLoop(objective, None, windows, 40, config, machine, clock.Clock()):
        pass
    model.eval()
    (end,) = reader.tokenizer.convert_tokens_to_ids(["<|im_end|>"])
    for word, letter in letters.items():
        prompt = f"<|im_start|>user\nWhere is {word}?<|im_end|>\n<|im_start|>assistant\n"
        ids = torch.tensor([reader.tokenizer(prompt, add_special_tokens=False)["input_ids"]])
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False, eos_token_id=end
        )
        assert reader.tokenizer.decode(out[0, ids.shape[1] :]) == f"{letter}<|im_end|>"
