"""What models write after the beginning of a held-out text, and how much of it they say twice."""

import torch

NUM_TOKENS = 48
"""Tokens that a sample goes on for."""
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


def teacher_says(teacher, text):
    """What the teacher writes after `text`; what its cache has kept, where it is one."""
    return teacher.says if teacher.model is None else continue_text(teacher.model, teacher.reader.tokenizer, text)


@torch.no_grad()
def continue_text(model, tokenizer, text, num_tokens=NUM_TOKENS):
    """What a model writes after `text`, greedily: at most `num_tokens` tokens, without the beginning."""
    inputs = tokenizer(text, return_tensors="pt", return_token_type_ids=False).to(model.device)
    was_training = model.training
    model.eval()
    out = model.generate(**inputs, max_new_tokens=num_tokens, do_sample=False, pad_token_id=tokenizer.pad_token_id or 0)
    model.train(was_training)
    return tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


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
