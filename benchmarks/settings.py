"""What the quality study is made on: pairs of teacher and student with their text, and students that were trained before.

`default` is the embedded default of `kdlib demo`; `stories` and `peps` read a folder of data (RESULTS.md says what is in it)
and are None without one. What takes minutes to make (teachers, trained students) is kept in the cache folder, named by all
that decides it.
"""

import copy
import dataclasses
import functools
import hashlib
import json
from pathlib import Path

import numpy as np
import torch
import transformers

from kdlib import clock, demo, environment
from kdlib.config import Config
from kdlib.data import tokenize, windowing
from kdlib.data.corpus import Document
from kdlib.models import devices, loading
from kdlib.models.head import Head
from kdlib.session import inputs
from kdlib.training.loop import TrainLoop
from kdlib.training.objective import Objective

CHARS = 200_000
"""Text of its own that a student learns from."""
PRETRAINED_STEPS = 600
PRETRAINED = Config(
    max_length=demo.WINDOW, batch_size=8, learning_rate=5e-3, weight_decay=0.1, kd_method="none", lm_weight=1.0
)
LARGE_TEACHER = {**demo.TEACHER, "vocab": 3 * demo.STUDENT["vocab"]}
FOLDER = Path(__file__).parent.parent.parent / "shared" / "data"
"""Where data is looked for when no folder is named."""


@dataclasses.dataclass
class Setting:
    """A pair with its text; `fresh(seed)` makes a student with new weights, `trained()` a copy of one that was trained
    before on `other` text. `text` names what is read, by a hash.
    """

    name: str
    config: Config
    inputs: object
    other: list
    text: str
    about: str
    kept: dict = dataclasses.field(default_factory=dict)
    """What methods have made of the pair, once."""

    def student(self, kind, seed):
        return self.trained() if kind == "pretrained" else self.fresh(seed)

    def fresh(self, seed):
        torch.manual_seed(seed)
        return demo.llama(self.inputs.pair.student_reader.tokenizer, **demo.STUDENT).eval()

    def trained(self):
        return copy.deepcopy(self._trained).eval()

    @functools.cached_property
    def _trained(self):
        tokenizer = self.inputs.pair.student_reader.tokenizer
        facts = [self.text, PRETRAINED_STEPS, PRETRAINED.to_dict(), demo.STUDENT, tokenizer.backend_tokenizer.to_str()]
        folder = _folder("student", *facts, *self.other)
        if not (folder / "config.json").exists():
            model = self.fresh(0)
            train_plainly(model, tokenizer, self.other, PRETRAINED_STEPS, PRETRAINED)
            _keep(folder, lambda path: model.save_pretrained(path))
        return transformers.AutoModelForCausalLM.from_pretrained(folder)


def default(_):
    """The embedded default; its trained student has read docstrings of other modules."""
    cache = environment.cache_folder()
    if not demo.is_ready(cache):
        for _ in demo.prepare(cache):
            pass
    known, own, _ = demo.split(demo.docstrings())
    other = [text for text in known if text not in set(own)]
    return _setting("default", demo.config(cache), other, "200 kB of docstrings, byte-level BPE 2,048 to Unigram 1,024")


def stories(folder):
    """The real stories260k teacher (SentencePiece, 512 pieces) and a student with a byte-level BPE of 2,048 tokens; its
    trained student has read a novel.
    """
    if not (folder / "models/stories260k").exists():
        return None
    texts = json.loads((folder / "texts/tinystories_1000.json").read_text(encoding="utf-8"))
    texts = [text if isinstance(text, str) else text["text"] for text in texts]
    count = int(np.searchsorted(np.cumsum([len(text) for text in texts]), CHARS))
    own, held = texts[:count], texts[-150:]
    novel = (folder / "texts/standardebooks_emma.txt").read_text(encoding="utf-8")
    tokenizer = demo.byte_level_bpe(texts[:-150], 2048)
    config = _written("stories", tokenizer, own, held, folder / "models/stories260k")
    return _setting("stories", config, [novel], "200 kB of stories, SentencePiece 512 to byte-level BPE 2,048")


def peps(folder):
    """PEPs, a teacher with three times the student's vocabulary: byte-level BPE 3,072 to Unigram 1,024. The teacher was
    trained on all PEPs that are not held out, the student before on docstrings: other text.
    """
    if not (folder / "texts/python_peps.txt").exists():
        return None
    texts = (folder / "texts/python_peps.txt").read_text(encoding="utf-8").split("\f")
    texts = sorted(
        (text.strip() for text in texts if text.strip()), key=lambda text: hashlib.sha256(text.encode()).digest()
    )
    held, known = texts[: len(texts) // 4], texts[len(texts) // 4 :]
    own = known[: int(np.searchsorted(np.cumsum([len(text) for text in known]), CHARS))]
    docstrings = list(demo.docstrings().values())
    tokenizer = demo.byte_level_bpe(known, LARGE_TEACHER["vocab"])
    place = _folder("teacher", LARGE_TEACHER, *known)
    if not (place / "config.json").exists():
        torch.manual_seed(0)
        teacher = demo.llama(tokenizer, **LARGE_TEACHER)
        for _ in demo.train_teacher(teacher, tokenizer, known, clock.Clock(), LARGE_TEACHER["steps"]):
            pass
        _keep(place, lambda path: demo.save(teacher, tokenizer, path))
    config = _written("peps", demo.unigram(known, demo.STUDENT["vocab"]), own, held, place)
    about = "200 kB of PEPs, byte-level BPE 3,072 to Unigram 1,024"
    return _setting("peps", config, docstrings, about)


SETTINGS = {"default": default, "stories": stories, "peps": peps}


def train_plainly(model, tokenizer, texts, num_steps, config):
    """Next-token training through kdlib's own loop."""
    reader = tokenize.wrap_tokenizer(tokenizer, loading.vocab.read_vocabulary(tokenizer))
    windows = []
    for number, text in enumerate(texts):
        document = Document(text)
        encoded = tokenize.encode(document, reader)
        windows += windowing.cut_windows(document, encoded, encoded, reader, reader, config.max_length, number)
    objective = Objective(model, Head(model, reader.vocabulary), config)
    machine = devices.accelerator("fp32", cpu=True)
    for _ in TrainLoop(objective, None, windows, num_steps, config, machine, clock.Clock()):
        pass


def _setting(name, config, other, about):
    loaded = inputs.load(config)
    tokenizers = [reader.tokenizer for reader in (loaded.pair.student_reader, loaded.pair.teacher.reader)]
    facts = [loaded.train.digest(), *(tokenizer.backend_tokenizer.to_str() for tokenizer in tokenizers)]
    return Setting(name, config, loaded, other, _hash(*facts), about)


def _written(name, tokenizer, own, held, teacher):
    """The config of a pair whose student and text lie in the cache folder."""
    folder = _folder(name, tokenizer.backend_tokenizer.to_str(), *own, *held)
    if not (folder / "student").exists():

        def write(path):
            path.mkdir()
            demo.write_jsonl(path / "train.jsonl", own)
            demo.write_jsonl(path / "held_out.jsonl", held)
            torch.manual_seed(0)
            demo.save(demo.llama(tokenizer, **demo.STUDENT), tokenizer, path / "student")

        _keep(folder, write)
    parts = {"student": "student", "dataset": "train.jsonl", "eval_dataset": "held_out.jsonl"}
    paths = {name: str(folder / part) for name, part in parts.items()}
    return demo.config(environment.cache_folder()).replace(teacher=str(teacher), **paths)


def _folder(name, *facts):
    return Path(environment.cache_folder()) / "quality" / f"{name}-{_hash(*facts)}"


def _hash(*facts):
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:12]


def _keep(folder, write):
    """Write a folder beside and rename it, so that nothing half-made is taken for whole."""
    beside = folder.with_name(folder.name + ".tmp")
    beside.parent.mkdir(parents=True, exist_ok=True)
    write(beside)
    beside.rename(folder)
