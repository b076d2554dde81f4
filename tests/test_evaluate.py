import json
import math
import shutil
import types

import pytest
import tokenizers
import torch
import transformers
from families import FAMILIES, byte_level, reader, tiny_model

from kdlib import compare
from kdlib.align import vocab
from kdlib.config import Config
from kdlib.data import tokenize, windowing
from kdlib.data.corpus import Document
from kdlib.evaluation import samples, scoring
from kdlib.models import devices as precision
from kdlib.models import forward
from kdlib.models.head import Head
from kdlib.models.teacher import Teacher
from kdlib.session import inputs


@pytest.fixture
def small():
    ours, theirs = reader("unigram"), reader("byte_level")
    student, teacher = tiny_model(ours.tokenizer, 16), tiny_model(theirs.tokenizer, 24, seed=1)
    texts = ["The cat sat on the mat, and the dog looked.", "Return the first item of the list."]
    windows = []
    for number, text in enumerate(texts):
        document = Document(text)
        sides = [tokenize.encode(document, used) for used in (ours, theirs)]
        windows += windowing.cut_windows(document, *sides, ours, theirs, 20, number)
    head = Head(student, ours.vocabulary)
    shared = vocab.shared_vocabulary(ours.vocabulary, theirs.vocabulary)
    teacher = Teacher(teacher, theirs)
    return (
        student,
        head,
        teacher,
        windows,
        scoring.prepare_held_out(windows, teacher, head, shared, 2, chunk_size=5),
        shared,
    )


def nats_by_hand(model, windows, side):
    """Per window: nats of every label and of the scored ones, a window at a time, in float64."""
    every, scored, size = [], {}, {}
    for window in windows:
        ids = torch.from_numpy(getattr(window, f"{side}_ids"))[None]
        with torch.no_grad():
            logs = model(ids, attention_mask=torch.ones_like(ids)).logits[0].double().log_softmax(-1)
        for row, (label, counts) in enumerate(
            zip(getattr(window, f"{side}_labels"), getattr(window, f"{side}_scored"), strict=True)
        ):
            if label != -100:
                every.append(-float(logs[row, label]))
                scored[window.document] = scored.get(window.document, 0.0) + counts * every[-1]
        size[window.document] = size.get(window.document, 0) + window.num_bytes
    return every, scored, size


@pytest.mark.parametrize("side", ["student", "teacher"])
def test_bits_per_byte_and_perplexity_are_written_out(small, side):
    student, head, teacher, windows, held_out, _ = small
    if side == "student":
        score = scoring.evaluate_student(student, head, held_out, chunk_size=5)
        every, scored, size = nats_by_hand(student, windows, side)
    else:
        score = held_out.teacher_score
        every, scored, size = nats_by_hand(teacher.model, windows, side)
    assert score.perplexity == pytest.approx(math.exp(sum(every) / len(every)), rel=1e-5)
    total = sum(scored.values()) / math.log(2) / sum(size.values())
    assert score.bits_per_byte == pytest.approx(total, rel=1e-5)
    assert score.bits.tolist() == pytest.approx([scored[d] / math.log(2) for d in (0, 1)], rel=1e-5)
    assert score.num_bytes.tolist() == [size[0], size[1]]


def test_kl_and_agreement_are_written_out(small):
    student, head, teacher, windows, held_out, shared = small
    score = scoring.evaluate_student(student, head, held_out)
    kl, agreed, count = 0.0, 0, 0
    ours, theirs = reader("unigram").vocabulary, reader("byte_level").vocabulary
    for window in windows:
        with torch.no_grad():
            q = student(torch.from_numpy(window.student_ids)[None]).logits[0].double().softmax(-1)
            p = teacher.model(torch.from_numpy(window.teacher_ids)[None]).logits[0].double().softmax(-1)
        for row, other in zip(window.student_rows, window.teacher_rows, strict=True):
            ps, qs = p[other][shared.teacher_ids], q[row][shared.student_ids]
            ps, qs = torch.cat([ps, 1 - ps.sum(0, True)]), torch.cat([qs, 1 - qs.sum(0, True)])
            kl += float((ps * (ps / qs).log()).sum())
            agreed += theirs.tokens[int(p[other].argmax())] == ours.tokens[int(q[row].argmax())]
            count += 1
    assert score.kl_to_teacher == pytest.approx(kl / count, rel=1e-4)
    assert score.top1_agreement == pytest.approx(agreed / count)


def test_a_student_that_is_its_teacher_agrees_fully():
    used = reader("byte_level")
    model = tiny_model(used.tokenizer)
    document = Document("The cat sat on the mat.")
    coded = tokenize.encode(document, used)
    windows = windowing.cut_windows(document, coded, coded, used, used, 40)
    head, shared = Head(model, used.vocabulary), vocab.shared_vocabulary(used.vocabulary, used.vocabulary)
    held_out = scoring.prepare_held_out(windows, Teacher(tiny_model(used.tokenizer), used), head, shared, 4)
    score = scoring.evaluate_student(model, head, held_out)
    assert score.kl_to_teacher == pytest.approx(0.0, abs=1e-6)
    assert score.top1_agreement == 1.0
    assert score.bits_per_byte == pytest.approx(held_out.teacher_score.bits_per_byte, rel=1e-6)


def test_evaluation_leaves_the_training_mode_as_it_was(small):
    student, head, _, _, held_out, _ = small
    student.train()
    scoring.evaluate_student(student, head, held_out)
    assert student.training


def test_perplexity_knows_nothing_of_label_smoothing(settings):
    plain, smoothed = (
        inputs.load(Config.from_dict({**settings, "label_smoothing": smoothing})) for smoothing in (0.0, 0.5)
    )
    scores = [scoring.evaluate_student(i.pair.student, i.pair.head, i.test).perplexity for i in (plain, smoothed)]
    assert scores[0] == scores[1]


def test_a_teacher_that_reads_foreign_ids_is_refused(settings, texts, tmp_path):
    """A teacher that has learned the text passes; the same weights behind a tokenizer with other ids do not."""
    tokenizer = byte_level()
    model = tiny_model(tokenizer, 32).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(120):
        ids = torch.tensor([tokenizer(texts[step % len(texts)])["input_ids"][step % 7 :]])
        model(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(tmp_path / "teacher")
    tokenizer.save_pretrained(tmp_path / "teacher")
    config = Config.from_dict(
        {**settings, "teacher": str(tmp_path / "teacher"), "check_teacher": True, "eval_tokens": 4000}
    )
    inputs.load(config)

    shutil.rmtree(tmp_path / "teacher")
    model.save_pretrained(tmp_path / "teacher")
    foreign = byte_level(330 - 1)
    spec = json.loads(foreign.backend_tokenizer.to_str())
    order = sorted(spec["model"]["vocab"], key=spec["model"]["vocab"].get)
    spec["model"]["vocab"] = {piece: i + 1 for i, piece in enumerate(reversed(order[1:]))} | {order[0]: 0}
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer.from_str(json.dumps(spec)), eos_token="<|endoftext|>"
    ).save_pretrained(tmp_path / "teacher")
    with pytest.raises(ValueError, match=r"above the unigram cross-entropy .*another model's"):
        inputs.load(config)


def test_samples_go_on_from_the_same_opening(small):
    student, _, _, _, held_out, _ = small
    opening = samples.openings(held_out, reader("unigram").tokenizer, 1)[0]
    assert opening
    sample = samples.continue_text(student, reader("unigram"), opening, num_tokens=5)
    assert isinstance(sample.text, str)
    assert sample.num_tokens <= 5


@pytest.mark.parametrize("name", FAMILIES)
def test_tokens_that_the_tokenizer_would_cut_otherwise_by_hand(name):
    tokens = reader(name).vocabulary.tokens
    ids = reader(name).tokenizer("the rivers of the land", add_special_tokens=False)["input_ids"]
    assert samples.recut(reader(name), ids[:2], ids[2:]) == (len(ids) - 2, 0)
    # the longest token after the first two, in its own bytes: each of them is a token that the tokenizer would not make
    long = max(range(2, len(ids)), key=lambda i: len(tokens[ids[i]]))
    letters = [tokens.index(bytes([byte])) for byte in tokens[ids[long]] if bytes([byte]) in tokens]
    if 1 < len(letters) == len(tokens[ids[long]]):
        apart = [*ids[2:long], *letters, *ids[long + 1 :]]
        assert samples.recut(reader(name), ids[:2], apart) == (len(apart), len(letters))


def test_written_tokens_end_at_a_special_token_and_at_an_unfinished_character():
    read = reader("byte_level")
    ids = read.tokenizer("the é", add_special_tokens=False)["input_ids"]
    assert samples.recut(read, ids[:1], [*ids[1:], read.eos[0], ids[0]])[0] == len(ids) - 1
    half = read.vocabulary.tokens.index("é".encode()[:1])
    assert samples.recut(read, ids[:1], [ids[0], half]) == (1, samples.recut(read, ids[:1], ids[:1])[1])
    assert samples.recut(read, [half], [ids[0]]) == (0, 0)


def test_nothing_is_counted_in_a_text_that_the_tokenizer_reads_as_another():
    read = reader("byte_level_lower")
    ids = read.tokenizer("the rivers", add_special_tokens=False)["input_ids"]
    assert samples.recut(read, ids[:1], ids[1:])[0] == len(ids) - 1
    capital = read.vocabulary.tokens.index(b"A")
    assert samples.recut(read, ids[:1], [*ids[1:], capital]) == (0, 0)


def test_the_share_of_recut_tokens_is_over_all_samples():
    found = [samples.Sample("", 3, 1), samples.Sample("", 1, 1), samples.Sample("", 0, 0)]
    assert samples.recut_share(found) == 0.5
    assert samples.recut_share(found[2:]) is None


def test_repetition_and_distinct_n_by_hand():
    texts = ["a b c d a b c d", "a b c d", "x y"]
    # the first text has five runs of four words, the first and the last alike; the second has one; the third has none
    assert samples.repeated(texts) == pytest.approx(1 / 6)
    # pairs: ab bc cd da ab bc cd, ab bc cd, xy: five different ones of eleven
    assert samples.distinct(texts) == pytest.approx(5 / 11)
    assert samples.repeated(["a b"]) is None
    assert samples.distinct(["a"]) is None


def test_openings_are_of_different_documents(small):
    held_out = small[4]
    found = samples.openings(held_out, reader("unigram").tokenizer, 5, num_tokens=12)
    assert len(found) == 2
    assert len({text.split()[0] for text in found}) == 2


def test_a_comparison_tells_what_was_kept_of_the_teacher(settings):
    config, heard = Config.from_dict({**settings, "control": "off"}), []
    found = compare.compare(config, lambda *told: heard.append(told))
    loaded = inputs.load_for_evaluation(config)
    score = scoring.evaluate_student(loaded.pair.student, loaded.pair.head, loaded.test)
    batches = [(done, len(loaded.test.batches)) for done in range(len(loaded.test.batches))]
    counted = {phase: [told[1:] for told in heard if told[0] == phase] for phase, *_ in heard}
    assert {phase: counts for phase, counts in counted.items() if counts != [(0, 0)]} == {
        "the teacher reads held-out text": batches,
        "scoring the student on test text": batches,
        "both write samples": [(done, 16) for done in range(16)],
    }
    assert list(counted)[:4] == [
        "reading the text",
        "loading the teacher",
        "loading the student",
        "tokenizing the text",
    ]
    assert found["student"] == {
        **score.summary(),
        "calibration_error": pytest.approx(found["student"]["calibration_error"]),
    }
    assert found["alignment"] == loaded.alignment
    whole = sum(document["student"] * document["num_bytes"] for document in found["documents"])
    assert whole / sum(document["num_bytes"] for document in found["documents"]) == pytest.approx(score.bits_per_byte)
    assert found["retention"]["student"] == score.retention
    assert sum(score.retention["frequency"]["num"]) > 0
    assert score.retention["frequency"]["num"][0] == 0.0  # it is counted in this very text
    assert len(found["samples"]["openings"]) == len(found["samples"]["student"]["texts"]) == 8
    page = "\n".join(compare.text_lines(found))
    for words in (
        f"{score.bits_per_byte:.4f}",
        "position in the document",
        "40 documents",
        "distinct-2",
        f"{score.top1_agreement:.1%}",
    ):
        assert words in page


@pytest.mark.parametrize(
    ("wanted", "there", "dtype"), [("auto", "cuda:1", torch.float16), ("cpu", "cpu", torch.float32)]
)
def test_a_comparison_is_made_on_the_cards_that_are_there(settings, monkeypatch, wanted, there, dtype):
    machine = types.SimpleNamespace(device=torch.device("cuda"), mixed_precision="fp16", num_processes=1)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(precision, "accelerator", lambda amp_dtype: machine)
    asked = []

    def load_for_evaluation(config, *devices):
        asked.extend(devices[:3])
        raise ZeroDivisionError

    monkeypatch.setattr(inputs, "load_for_evaluation", load_for_evaluation)
    with pytest.raises(ZeroDivisionError):
        compare.compare(Config.from_dict({**settings, "teacher_device": wanted}))
    assert asked == [torch.device("cuda"), dtype, torch.device(there)]


def test_a_comparison_that_runs_out_of_memory_takes_smaller_batches(settings, monkeypatch):
    """First the teacher where it is asked, then the student where it is scored."""
    config = Config.from_dict({**settings, "batch_size": 8, "packing": "off"})
    wanted, real, sizes = compare.compare(config), forward.last_hidden, []

    def last_hidden(model, ids, *rest, **more):
        sizes.append(len(ids))
        if len(ids) > (4 if model.config.hidden_size == 24 else 2):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(model, ids, *rest, **more)

    monkeypatch.setattr(forward, "last_hidden", last_hidden)
    found = compare.compare(config)
    assert {8, 4, 2} <= set(sizes)
    for name in ("teacher", "student"):
        assert found[name] == pytest.approx(wanted[name], rel=1e-5)
