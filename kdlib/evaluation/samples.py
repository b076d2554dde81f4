"""What models write after the beginning of a held-out text: repetitions, and tokens their tokenizer would cut otherwise."""

import dataclasses
import itertools

import torch

NUM_TOKENS = 48
"""Tokens that a sample goes on for."""
NUM_OPENINGS = 8
"""Beginnings that are continued."""
NGRAM = 4
"""Words in a row that make a repetition."""


def openings(held_out, tokenizer, count, num_tokens=24):
    """The beginnings of the longest held-out windows of `count` different documents, as text up to their last whole word."""
    windows = sorted((w for group in held_out.windows for w in group), key=lambda window: -len(window.student_ids))
    first = {}
    for window in windows:
        first.setdefault(window.document, window)
    texts = (
        tokenizer.decode(w.student_ids[:num_tokens], skip_special_tokens=True) for w in list(first.values())[:count]
    )
    return [text[: text.rindex(" ")] if " " in text.strip() else text for text in texts]


@dataclasses.dataclass(frozen=True)
class Sample:
    """The continuation of a text: its own `text`, and of its `num_tokens` tokens how many are no token of the text as the
    tokenizer reads it (`num_recut`). Both are 0 if the tokenizer changes the text that it reads.
    """

    text: str
    num_tokens: int
    num_recut: int


def teacher_says(teacher, text):
    """What the teacher writes after `text`; what its cache has kept, where it is one."""
    return teacher.says if teacher.model is None else continue_text(teacher.model, teacher.reader, text).text


@torch.no_grad()
def continue_text(model, reader, text, num_tokens=NUM_TOKENS):
    """The `Sample` that a model writes after `text`, greedily, of at most `num_tokens` tokens."""
    tokenizer = reader.tokenizer
    inputs = tokenizer(text, return_tensors="pt", return_token_type_ids=False).to(model.device)
    was_training = model.training
    model.eval()
    out = model.generate(**inputs, max_new_tokens=num_tokens, do_sample=False, pad_token_id=tokenizer.pad_token_id or 0)
    model.train(was_training)
    prompt, ids = (part.tolist() for part in out[0].tensor_split([inputs["input_ids"].shape[1]]))
    return Sample(tokenizer.decode(ids, skip_special_tokens=True), *recut(reader, prompt, ids))


def recut(reader, prompt, ids):
    """`(num_tokens, num_recut)`: of the tokens `ids`, written after the tokens `prompt`, how many there are before the first
    special token or unfinished character, and how many of these cover other bytes than every token of the same text as the
    tokenizer reads it. `(0, 0)` if it makes other bytes of the text.
    """
    tokens = reader.vocabulary.tokens
    before = [tokens[i] or b"" for i in prompt]
    written = [tokens[i] for i in ids]
    written = written[: written.index(None)] if None in written else written
    while written and not _is_text(b"".join(before + written)):
        written.pop()
    data = b"".join(before + written)
    if not _is_text(data):
        return 0, 0
    added = reader.vocabulary.adds_space and data.startswith(b" ")  # read again, it would be added again
    text = data.decode()[added:]
    again = [tokens[i] or b"" for i in reader.tokenizer(text, add_special_tokens=False)["input_ids"]]
    if b"".join(again) != data:
        return 0, 0
    spans = _spans(before + written)[len(before) :]
    return len(spans), len(spans) - len(set(spans) & set(_spans(again)))


def recut_share(found):
    """The share of recut tokens among those of some `Sample`s, in [0, 1]; None if there are none."""
    count = sum(sample.num_tokens for sample in found)
    return sum(sample.num_recut for sample in found) / count if count else None


def _spans(tokens):
    """`(start, end)` in bytes of each token."""
    ends = list(itertools.accumulate(map(len, tokens)))
    return list(zip([0, *ends], ends, strict=False))


def _is_text(data):
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True


def repeated(texts, n=NGRAM):
    """The share of n-grams of words that stood in the same text before, in [0, 1]; None where no text has n words."""
    grams = [_grams(text, n) for text in texts]
    count = sum(map(len, grams))
    return 1.0 - sum(len(set(each)) for each in grams) / count if count else None


def distinct(texts, n=2):
    """Different n-grams of words over all texts for each n-gram: distinct-n of Li et al. 2016, arXiv 1510.03055, section 5.
    None where no text has n words.
    """
    grams = [gram for text in texts for gram in _grams(text, n)]
    return len(set(grams)) / len(grams) if grams else None


def _grams(text, n):
    words = text.split()
    return [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
