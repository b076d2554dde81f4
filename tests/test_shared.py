"""Real tokenizers, a real teacher and real texts, where they are at hand (../shared/data); skipped elsewhere."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from kdlib import demo
from kdlib.align import boundaries, vocab
from kdlib.config import Config
from kdlib.data import tokenize
from kdlib.data.corpus import Document
from kdlib.evaluation import scoring
from kdlib.models import loading
from kdlib.session import inputs

DATA = Path(__file__).parent.parent.parent / "shared" / "data"
pytestmark = pytest.mark.skipif(not DATA.exists(), reason="needs ../shared/data")


def reader(name):
    return loading.load_reader(str(DATA / "tokenizers" / name), "tokenizer")


def text(name, size=100_000):
    return (DATA / "texts" / name).read_text(encoding="utf-8")[:size]


PAIRS = [("gpt2", "cl100k", 0.80), ("gpt2", "mistral-v1-32k", 0.80), ("mistral-v1-32k", "cl100k", 0.60)]


@pytest.mark.parametrize(("ours", "theirs", "least"), PAIRS, ids=["gpt2-cl100k", "gpt2-mistral", "mistral-cl100k"])
@pytest.mark.parametrize("name", ["tinyshakespeare.txt", "standardebooks_emma.txt", "python_peps.txt"])
def test_real_pairs_meet_in_most_positions_and_rarely_by_index(ours, theirs, least, name):
    document = Document(text(name))
    pair = reader(ours), reader(theirs)
    coded = [tokenize.encode(document, used) for used in pair]
    found = boundaries.align(*coded)
    assert all(one.faithful.mean() > 0.99 for one in coded)
    assert found.usable.mean() > 0.98
    assert len(found) / len(coded[0]) > least
    assert (found.student == found.teacher).mean() < 0.05
    said = document.text.encode()
    for used, one, positions in zip(pair, coded, (found.student, found.teacher), strict=True):
        following = [used.vocabulary.tokens[i] for i in one.ids[positions[found.usable] + 1]]
        assert all(
            said[end:].startswith(token) for end, token in zip(found.ends[found.usable][:500], following, strict=False)
        )


def test_the_shared_vocabulary_of_two_real_tokenizers():
    shared = vocab.shared_vocabulary(reader("gpt2").vocabulary, reader("cl100k").vocabulary)
    assert shared.student_share > 0.6
    assert len(set(shared.teacher_ids)) == len(shared)


def test_prefix_buckets_leave_little_of_a_real_vocabulary_in_the_tail():
    ours, theirs = reader("gpt2"), reader("cl100k")
    shared = vocab.shared_vocabulary(ours.vocabulary, theirs.vocabulary)
    first = tokenize.first_tokens(ours, theirs.vocabulary.tokens), tokenize.first_tokens(theirs, ours.vocabulary.tokens)
    buckets = vocab.prefix_buckets(ours.vocabulary, theirs.vocabulary, shared, *first)
    assert (buckets.student == buckets.num - 1).mean() < 0.02
    assert (buckets.teacher == buckets.num - 1).mean() < 0.02
    assert shared.teacher_share < 0.5


def test_a_real_teacher_scores_what_plain_transformers_says(tmp_path):
    """Whole stories through the real teacher alone, against its score through a student's windows and common bytes."""
    source = DATA / "models" / "stories260k"
    own, model = (
        transformers.AutoTokenizer.from_pretrained(source),
        transformers.AutoModelForCausalLM.from_pretrained(source),
    )
    stories = json.loads((DATA / "texts" / "tinystories_1000.json").read_text())[:200]
    stories = [story for story in stories if len(own(story)["input_ids"]) < 300][:30]
    nats = 0.0
    for story in stories:
        ids = torch.tensor([own(story)["input_ids"]])
        with torch.no_grad():
            nats += float(model(ids, labels=ids).loss) * (ids.shape[1] - 1)
    expected = nats / math.log(2) / sum(len(story.encode()) for story in stories)
    (tmp_path / "stories.jsonl").write_text("".join(json.dumps({"text": story}) + "\n" for story in stories))
    tokenizer = transformers.AutoTokenizer.from_pretrained(DATA / "tokenizers" / "gpt2")
    demo.save(demo.llama(tokenizer, 16, 1, 2), tokenizer, tmp_path / "student")
    config = Config(
        teacher=str(source), student=str(tmp_path / "student"), dataset=str(tmp_path / "stories.jsonl"), max_length=384
    )
    loaded = inputs.load_for_evaluation(config)
    pair, held_out = loaded.pair, loaded.test
    # the first word of a story is in the one and not in the other
    assert held_out.teacher_score.bits_per_byte == pytest.approx(expected, rel=0.02)
    assert loaded.alignment["coverage"] > 0.9
    assert np.isfinite(scoring.evaluate_student(pair.student, pair.head, held_out).bits_per_byte)
