"""Greedy continuations of held-out text: repetition, and tokens that differ from the tokenizer's own segmentation."""

import dataclasses
import itertools

import torch

NUM_TOKENS = 48
"""Maximum length of a continuation."""
NUM_OPENINGS = 8
"""Number of texts to continue."""
NGRAM = 4
"""Words in an n-gram of `repeated`."""


def openings(held_out, tokenizer, count, num_tokens=24):
    """Returns the first words of the longest held-out window in each of `count` documents."""
    windows = sorted((w for group in held_out.windows for w in group), key=lambda window: -len(window.student_ids))
    longest = {}
    for window in windows:
        longest.setdefault(window.document, window)
    starts = [window.student_ids[:num_tokens] for window in list(longest.values())[:count]]
    texts = (tokenizer.decode(ids, skip_special_tokens=True) for ids in starts)
    return [text[: text.rindex(" ")] if " " in text.strip() else text for text in texts]


@dataclasses.dataclass(frozen=True)
class Sample:
    """Continuation of a prompt. `num_recut` of its `num_tokens` tokens are not in the tokenizer's encoding of the text.
    Both are 0 if the tokenizer does not preserve the text.
    """

    text: str
    num_tokens: int
    num_recut: int


def continue_text_by_teacher(teacher, text):
    """Returns the teacher's continuation of `text`, or the cached one if the teacher is a cache."""
    return teacher.sample if teacher.model is None else continue_text(teacher.model, teacher.reader, text).text


@torch.no_grad()
def continue_text(model, reader, text, num_tokens=NUM_TOKENS):
    """Returns the greedy continuation of `text` as a `Sample` of at most `num_tokens` tokens."""
    tokenizer = reader.tokenizer
    inputs = tokenizer(text, return_tensors="pt", return_token_type_ids=False).to(model.device)
    was_training = model.training
    model.eval()
    output = model.generate(
        **inputs, max_new_tokens=num_tokens, do_sample=False, pad_token_id=tokenizer.pad_token_id or 0
    )
    model.train(was_training)
    prompt, ids = (part.tolist() for part in output[0].tensor_split([inputs["input_ids"].shape[1]]))
    return Sample(tokenizer.decode(ids, skip_special_tokens=True), *recut(reader, prompt, ids))


def recut(reader, prompt, ids):
    """Returns `(num_tokens, num_recut)` of the tokens `ids` that continue the tokens `prompt`.

    `num_tokens` counts those before the first special token or incomplete character. `num_recut` of them span other
    bytes than any token of the tokenizer's own encoding. Both are 0 if the tokenizer does not preserve the text.
    """
    tokens = reader.vocabulary.tokens
    prompt_bytes = [tokens[i] or b"" for i in prompt]
    new_bytes = [tokens[i] for i in ids]
    new_bytes = new_bytes[: new_bytes.index(None)] if None in new_bytes else new_bytes
    while new_bytes and not _is_text(b"".join(prompt_bytes + new_bytes)):
        new_bytes.pop()
    data = b"".join(prompt_bytes + new_bytes)
    if not _is_text(data):
        return 0, 0
    has_added_space = reader.vocabulary.adds_space and data.startswith(b" ")  # the tokenizer adds it again
    text = data.decode()[has_added_space:]
    reencoded = [tokens[i] or b"" for i in reader.tokenizer(text, add_special_tokens=False)["input_ids"]]
    if b"".join(reencoded) != data:
        return 0, 0
    spans = _spans(prompt_bytes + new_bytes)[len(prompt_bytes) :]
    return len(spans), len(spans) - len(set(spans) & set(_spans(reencoded)))


def recut_share(samples):
    """Returns the share of recut tokens over some `Sample`s, in [0, 1], or None without tokens."""
    count = sum(sample.num_tokens for sample in samples)
    return sum(sample.num_recut for sample in samples) / count if count else None


def _spans(tokens):
    """Returns `(start, end)` of each token in bytes."""
    ends = list(itertools.accumulate(map(len, tokens)))
    return list(zip([0, *ends], ends, strict=False))


def _is_text(data):
    return data.decode(errors="ignore").encode() == data


def repeated(texts, n=NGRAM):
    """Returns the share of word n-grams that repeat an earlier one of their text, or None without n-grams."""
    grams = [_grams(text, n) for text in texts]
    count = sum(map(len, grams))
    return 1.0 - sum(len(set(text_grams)) for text_grams in grams) / count if count else None


def distinct(texts, n=2):
    """Returns unique word n-grams per n-gram over all texts, or None without n-grams. Distinct-n: Li et al. 2016, arXiv
    1510.03055, section 5.
    """
    grams = [gram for text in texts for gram in _grams(text, n)]
    return len(set(grams)) / len(grams) if grams else None


def _grams(text, n):
    words = text.split()
    return [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
