import dataclasses

import numpy as np
import pytest
from families import LINES, LOSSLESS, byte_level, reader, unigram
from hypothesis import given, settings
from hypothesis import strategies as st

from kdlib.align import vocab
from kdlib.data import batching, tokenize, windowing
from kdlib.data.corpus import Document


def windows_of(text, ours="unigram", theirs="byte_level", max_length=24):
    document = text if isinstance(text, Document) else Document(text)
    pair = reader(ours), reader(theirs)
    return windowing.cut_windows(document, *(tokenize.encode(document, used) for used in pair), *pair, max_length)


def test_labels_are_the_next_token():
    for window in windows_of(LINES[0]):
        for i, label in enumerate(window.student_labels[:-1]):
            assert label == window.student_ids[i + 1]
        assert window.student_labels[-1] == windowing.IGNORE
        assert (window.teacher_labels[:-1] == window.teacher_ids[1:]).all()


def test_each_model_gets_its_own_ids():
    (window,) = windows_of("The cat sat.", max_length=60)
    ours, theirs = reader("unigram").tokenizer, reader("byte_level").tokenizer
    assert window.student_ids.tolist() == ours("The cat sat.")["input_ids"] + [ours.eos_token_id]
    assert window.teacher_ids.tolist() == theirs("The cat sat.")["input_ids"]


def test_every_window_starts_with_the_bos_and_only_the_last_ends_with_the_eos():
    ours = reader("unigram").tokenizer
    windows = windows_of(" ".join(LINES[:3]), max_length=20)
    assert len(windows) > 3
    assert all(window.student_ids[0] == ours.bos_token_id for window in windows)
    assert [window.student_ids[-1] == ours.eos_token_id for window in windows] == [False] * (len(windows) - 1) + [True]


@given(text=st.lists(st.sampled_from([*LINES, "😀", "東京", "  \n", "A"]), min_size=1, max_size=5).map(" ".join),
       max_length=st.integers(5, 60), ours=st.sampled_from(LOSSLESS), theirs=st.sampled_from(LOSSLESS))  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_windows_tile_the_text_and_pair_what_has_read_the_same(text, max_length, ours, theirs):
    """Rows of a window: student and teacher have read the same bytes of it, written out from the tokens."""
    windows = windows_of(text, ours, theirs, max_length)
    for window in windows:
        assert len(window.student_ids) <= max_length
        read = [
            _read(window.student_ids, window.student_rows, reader(ours).vocabulary),
            _read(window.teacher_ids, window.teacher_rows, reader(theirs).vocabulary),
        ]
        # only a text's first window can start with a space that a tokenizer put there
        spaces = [window is windows[0] and _puts_space(text, name) for name in (ours, theirs)]
        assert [part[spaces[0] :] for part in read[0]] == [part[spaces[1] :] for part in read[1]]
    said = b"".join(_read(w.student_ids, [len(w.student_ids) - 1], reader(ours).vocabulary)[0] for w in windows)
    if max_length >= 40:
        assert said[_puts_space(text, ours) :] == text.encode()


def _puts_space(text, name):
    """1 where the tokenizer puts a space in front of this text, else 0."""
    ids = reader(name).tokenizer(text, add_special_tokens=False)["input_ids"]
    return int(b"".join(reader(name).vocabulary.tokens[i] for i in ids) != text.encode())


def _read(ids, rows, vocabulary):
    tokens = [vocabulary.tokens[i] or b"" for i in ids]
    return [b"".join(tokens[: row + 1]) for row in rows]


def test_both_sides_score_the_same_bytes():
    for window in windows_of(" ".join(LINES[:4]), max_length=30):
        for ids, scored, name in (
            (window.student_ids, window.student_scored, "unigram"),
            (window.teacher_ids, window.teacher_scored, "byte_level"),
        ):
            tokens = reader(name).vocabulary.tokens
            labels = [ids[i + 1] for i in np.flatnonzero(scored)]
            assert sum(len(tokens[i]) for i in labels) == window.num_bytes > 0


def test_coverage_counts_student_positions_that_predict_text():
    (window,) = windows_of("The cat sat.", max_length=60)
    assert window.num_positions == len(window.student_ids) - 3  # without <s>, the last token, </s>
    assert 0 < len(window.student_rows) <= window.num_positions


TEMPLATE = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}</s>{% endfor %}"
CHAT = Document("", (("user", "Where is the cat?"), ("assistant", "The cat sat on the mat."), ("user", "Is it?"),
                     ("assistant", "The dog is.")))  # fmt: skip


def chat_reader(tokenizer, template=TEMPLATE):
    tokenizer.chat_template = template
    return tokenize.wrap_tokenizer(tokenizer, vocab.read_vocabulary(tokenizer))


def chat_window(max_length=400):
    ours = chat_reader(unigram())
    theirs = chat_reader(byte_level(), "{% for m in messages %}[{{ m.role }}] {{ m.content }}<|endoftext|>{% endfor %}")
    sides = [tokenize.encode(CHAT, used) for used in (ours, theirs)]
    (window,) = windowing.cut_windows(CHAT, *sides, ours, theirs, max_length)
    return window, ours, theirs


def test_a_conversation_is_learned_on_its_answers_only():
    window, ours, _ = chat_window()
    learned = window.student_labels[window.student_labels != windowing.IGNORE]
    said = b"".join(ours.vocabulary.tokens[i] or b"|" for i in learned).decode()
    assert said.split("|") == ["The cat sat on the mat.", "The dog is.", ""]
    assert learned.tolist().count(ours.tokenizer.eos_token_id) == 2


def test_a_conversation_is_aligned_inside_answers_across_two_templates():
    window, ours, theirs = chat_window()
    assert window.num_bytes == len("The cat sat on the mat.The dog is.")
    assert len(window.student_rows) > 6
    for row, other in zip(window.student_rows, window.teacher_rows, strict=True):
        assert window.student_labels[row] != windowing.IGNORE
        mine = ours.vocabulary.tokens[window.student_ids[row + 1]].strip()
        hers = theirs.vocabulary.tokens[window.teacher_ids[other + 1]].strip()
        assert mine.startswith(hers) or hers.startswith(mine)


def test_a_conversation_without_a_template_is_written_out_plainly():
    ours, theirs = reader("unigram"), reader("byte_level")
    sides = [tokenize.encode(CHAT, used) for used in (ours, theirs)]
    (window,) = windowing.cut_windows(CHAT, *sides, ours, theirs, 400)
    written = " ".join(ours.tokenizer.decode(window.student_ids).split())
    assert "User: Where is the cat? Assistant: The cat sat on the mat.</s>" in written
    assert (window.student_labels == ours.tokenizer.eos_token_id).sum() == 2
    assert window.num_bytes == len("The cat sat on the mat.The dog is.")


def test_a_long_conversation_is_cut_off_and_still_scores_equal_bytes():
    window, _, _ = chat_window(max_length=60)
    assert len(window.student_ids) <= 60
    assert 0 < window.num_bytes < len("The cat sat on the mat.The dog is.")


def test_a_template_that_changes_the_content_is_refused():
    with pytest.raises(ValueError, match=r"chat template .* drops or changes a user message"):
        tokenize.encode(CHAT, chat_reader(unigram(), "{% for m in messages %}{{ m.content | upper }}{% endfor %}"))


def test_collate_pads_on_the_right_and_moves_the_rows():
    windows = windows_of(LINES[0], max_length=60) + windows_of("Return it, dog.", max_length=60)
    batch = batching.collate(windows, 7, 9)
    long, short = windows
    assert batch.student_ids.shape == (2, len(long.student_ids))
    assert batch.student_ids[1, len(short.student_ids) :].unique().tolist() == [7]
    assert batch.teacher_ids[1, len(short.teacher_ids) :].unique().tolist() == [9]
    assert (batch.labels[1, len(short.student_ids) :] == windowing.IGNORE).all()
    assert batch.student_mask.sum(1).tolist() == [len(long.student_ids), len(short.student_ids)]
    assert batch.num_student_tokens == len(long.student_ids) + len(short.student_ids)
    assert batch.num_labels == sum(int((w.student_labels != windowing.IGNORE).sum()) for w in windows)
    flat = batch.student_ids.flatten()[batch.student_rows]
    assert flat.tolist() == [*long.student_ids[long.student_rows], *short.student_ids[short.student_rows]]
    flat = batch.teacher_ids.flatten()[batch.teacher_rows]
    assert flat.tolist() == [*long.teacher_ids[long.teacher_rows], *short.teacher_ids[short.teacher_rows]]


def test_the_order_of_an_epoch_is_a_permutation_fixed_by_its_seed():
    windows = [dataclasses.replace(w) for w in windows_of(" ".join(LINES), max_length=12)]
    order = batching.batch_order(windows, 4, seed=3, epoch=0)
    flat = [i for step in order for i in step]
    assert len(set(flat)) == len(flat) == len(windows) // 4 * 4
    assert order == batching.batch_order(windows, 4, seed=3, epoch=0)
    assert order != batching.batch_order(windows, 4, seed=3, epoch=1)
    assert order != batching.batch_order(windows, 4, seed=4, epoch=0)


def test_windows_of_similar_length_go_together():
    chance = np.random.default_rng(0)
    window = windows_of("The cat.")[0]
    windows = [dataclasses.replace(window, student_ids=np.zeros(n, np.int64)) for n in chance.integers(20, 200, 640)]
    lengths = np.array([len(w.student_ids) for w in windows])
    steps = np.array(batching.batch_order(windows, 8, seed=0, epoch=0))
    computed = sum(8 * lengths[step].max() for step in steps)
    assert computed < 1.1 * lengths[steps].sum()


def test_batches_move_between_devices_whole():
    batch = batching.collate(windows_of("The cat."))
    moved = batch.to("meta")
    plain = {
        "student_row_slices",
        "teacher_row_slices",
        "rows_by_window",
        "window_ids",
        "order",
        "batch_id",
        "host_copy",
    }
    tensors = [getattr(moved, f.name) for f in dataclasses.fields(moved) if f.name not in plain]
    assert len(tensors) == 12
    assert all(tensor.device.type == "meta" for tensor in tensors)
    assert moved.rows_by_window == batch.rows_by_window == (moved.num_aligned,)
    assert moved.batch_id is batch.batch_id is not batching.collate(windows_of("The cat.")).batch_id
