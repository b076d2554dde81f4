"""The demo: a small teacher, a student and a text, built offline from Python's standard library.

The text is the docstrings of the standard library, split by module to prevent leaks. Two tokenizers of different
families and the teacher are trained on it. The student has new weights and little text of its own. Results are cached.
"""

import ast
import contextlib
import hashlib
import json
import math
import sys
import sysconfig
import warnings
from pathlib import Path

import filelock
import tokenizers
import torch
import transformers

from kdlib import environment, files
from kdlib.clock import Clock
from kdlib.config import Config
from kdlib.data import tokenize, windowing
from kdlib.data.records import Document
from kdlib.models import devices, loading
from kdlib.models.head import Head
from kdlib.training import loop
from kdlib.training.objective import Objective

RECIPE = 2
"""Version of the demo's models and text; increase it when they change, to invalidate old caches."""

EXCLUDED = {"test", "tests", "idlelib", "lib2to3", "turtledemo", "site-packages", "dist-packages", "__pycache__"}
TEACHER = {"vocab": 2048, "width": 128, "layers": 4, "heads": 4, "steps": 1200}
STUDENT = {"vocab": 1024, "width": 64, "layers": 2, "heads": 4}
STUDENT_CHARS = 200_000
WINDOW = 128
WAIT_S = 1.0
TEACHER_CONFIG = Config(
    max_length=WINDOW, batch_size=8, learning_rate=3e-3, weight_decay=0.1, kd_method="none", lm_weight=1.0, warmup=0.03
)


def docstrings(chars=math.inf):
    """Returns the docstrings of Python's standard library, without duplicates: `{module path: text}`.

    A finite `chars` stops after about that many characters, with modules in pseudo-random order.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    seen, texts, paths = set(), {}, sorted(root.rglob("*.py"))
    if math.isfinite(chars):
        paths.sort(key=lambda path: hashlib.sha256(path.relative_to(root).as_posix().encode()).digest()[::-1])
    for path in paths:
        if sum(map(len, texts.values())) >= chars:
            break
        module = path.relative_to(root)
        if EXCLUDED & set(module.parts):
            continue
        unique = [text for text in _docstrings_of(path) if text not in seen]
        seen.update(unique)
        if unique:
            texts[module.as_posix()] = "\n\n".join(unique)
    return texts


def split(texts, student_chars=STUDENT_CHARS):
    """Splits texts into `(teacher's, student's, held-out)` lists. The student's are a small part of the teacher's."""
    train, held_out = [], []
    for module, text in texts.items():
        first_byte = hashlib.sha256(module.encode()).digest()[0]
        (held_out if first_byte < 32 else train).append((module, text))
    shuffled = sorted(train, key=lambda item: hashlib.sha256(item[0].encode()).hexdigest())
    student, size = [], 0
    for _, text in shuffled:
        if size < student_chars:
            student.append(text)
            size += len(text)
    return [text for _, text in train], student, [text for _, text in held_out]


def folder(cache):
    """Returns the demo's folder for this Python version, below a cache folder."""
    return (
        Path(cache) / f"tiny-{RECIPE}-python{sys.version_info.major}.{sys.version_info.minor}.{sys.version_info.micro}"
    )


def is_ready(cache):
    return (folder(cache) / "complete.json").exists()


def config(cache, **changes):
    """Returns the `Config` that `kdlib demo` runs."""
    home = folder(cache)
    values = {
        "teacher": str(home / "teacher"),
        "student": str(home / "student"),
        "dataset": str(home / "train.jsonl"),
        "eval_dataset": str(home / "held_out.jsonl"),
        "max_length": WINDOW,
        "batch_size": 8,
        "max_steps": 600,
        "learning_rate": 5e-3,
        "projector_learning_rate": 5e-3,
        "weight_decay": 0.1,
        "control": "full",
        "eval_tokens": 12_000,
        "eval_steps": 60,
    }
    return Config.from_dict({**values, **changes})


def demo_config(steps, student_chars, chars, **changes):
    """Returns the `Config` of a smaller demo and builds it with `prepare` unless cached.

    Sets torch to one thread, which is fastest for models of this size.
    """
    torch.set_num_threads(1)
    cache = environment.cache_folder() / f"small-{steps}-{student_chars}-{chars}"
    if not is_ready(cache):
        for _progress in prepare(cache, steps=steps, student_chars=student_chars, chars=chars):
            pass
    return config(cache, **changes)


def prepare(cache, clock=None, steps=TEACHER["steps"], student_chars=STUDENT_CHARS, chars=math.inf):
    """Builds the demo below `cache`; a generator of progress, `(phase, done, total)`.

    `steps`: training steps of the teacher. `student_chars`: characters of the student's text. `chars`: characters of
    all text. The result is written atomically. If another process is building it, this one waits and uses its result.
    """
    home = folder(cache)
    home.parent.mkdir(parents=True, exist_ok=True)
    lock, waited = filelock.FileLock(home.with_name(home.name + ".lock")), False
    while not lock.is_locked:
        with contextlib.suppress(filelock.Timeout):
            lock.acquire(timeout=WAIT_S)
            break
        waited = True
        yield "waiting for another process to build the demo", 0, 0
    try:
        if not (waited and is_ready(cache)):
            yield from _build(home, clock or Clock(), steps, student_chars, chars)
    finally:
        lock.release()


def _build(home, clock, steps, student_chars, chars):
    with files.atomic(home) as path:
        path.mkdir()
        yield "reading the standard library's docstrings", 0, 0
        teacher_texts, student_texts, held_out = split(docstrings(chars), student_chars)
        write_jsonl(path / "train.jsonl", student_texts)
        write_jsonl(path / "held_out.jsonl", held_out)
        yield "training two tokenizers", 0, 0
        teacher_tokenizer = byte_level_bpe(teacher_texts, TEACHER["vocab"])
        student_tokenizer = unigram(teacher_texts, STUDENT["vocab"])
        torch.manual_seed(0)
        teacher = llama(teacher_tokenizer, **TEACHER)
        for record in train_teacher(teacher, teacher_tokenizer, teacher_texts, clock, steps):
            yield "training the teacher", record.step, steps
        save(teacher, teacher_tokenizer, path / "teacher")
        torch.manual_seed(0)
        save(llama(student_tokenizer, **STUDENT), student_tokenizer, path / "student")
        (path / "complete.json").write_text(json.dumps({"recipe": RECIPE, "bytes": sum(map(len, teacher_texts))}))


def train_teacher(model, tokenizer, texts, clock, steps):
    """Trains a model on next-token prediction with `TrainLoop`; a generator of its step records."""
    reader = tokenize.wrap_tokenizer(tokenizer, loading.vocab.read_vocabulary(tokenizer))
    windows = []
    for number, text in enumerate(texts):
        encoded = tokenize.encode(Document(text), reader)
        windows += windowing.cut_windows(
            Document(text), encoded, encoded, reader, reader, TEACHER_CONFIG.max_length, number
        )
    objective = Objective(model, Head(model, reader.vocabulary), TEACHER_CONFIG)
    with devices.temporary_accelerator("fp32", cpu=True) as accelerator:
        yield from loop.TrainLoop(objective, None, windows, steps, TEACHER_CONFIG, accelerator, clock)


def byte_level_bpe(texts, size):
    """Trains a byte-level BPE tokenizer as in GPT-2; a word includes its preceding space."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|endoftext|>", pad_token="<|endoftext|>"
    )


def unigram(texts, size):
    """Trains a Unigram tokenizer as in SentencePiece, with byte fallback and a BOS token `<s>`."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.Unigram())
    tokenizer.pre_tokenizer = _metaspace()
    special = ["<unk>", "<s>", "</s>"]
    trainer = tokenizers.trainers.UnigramTrainer(
        vocab_size=size - 256, special_tokens=special, unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    pieces = [(piece, round(score, 6)) for piece, score in json.loads(tokenizer.to_str())["model"]["vocab"]]
    learned = _deterministic(pieces[len(special) :])
    byte_pieces = [(f"<0x{byte:02X}>", learned[-1][1] - 10.0) for byte in range(256)]
    vocabulary = pieces[: len(special)] + byte_pieces + learned
    tokenizer = tokenizers.Tokenizer(tokenizers.models.Unigram(vocabulary, unk_id=0, byte_fallback=True))
    tokenizer.pre_tokenizer = _metaspace()
    tokenizer.decoder = tokenizers.decoders.Sequence(
        [tokenizers.decoders.ByteFallback(), tokenizers.decoders.Metaspace(prepend_scheme="first")]
    )
    tokenizer.add_special_tokens(special)
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="</s>"
    )


def _deterministic(pieces, step=1e-4):
    """Returns `(piece, score)` pairs sorted by score, the same for each training of the tokenizer.

    Last digits and the order of ties depend on threads of the trainer, as do the scores of unused characters, which it
    spaces by `step` above the lowest score. These characters get their scores in alphabetical order.
    """
    learned = sorted(pieces, key=lambda entry: (-entry[1], entry[0]))
    singles = [entry for entry in learned if len(entry[0]) == 1]
    unused = [entry for entry in singles if entry[1] <= learned[-1][1] + step * len(singles)]
    scores = dict(zip(sorted(piece for piece, _ in unused), [score for _, score in unused], strict=True))
    return sorted(
        ((piece, scores.get(piece, score)) for piece, score in learned), key=lambda entry: (-entry[1], entry[0])
    )


def llama(tokenizer, width, layers, heads, vocab=None, steps=None):
    """Returns a small Llama model with new weights. At this size, an initializer range of 0.08 trains much faster."""
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=width * 8 // 3 // 8 * 8,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=heads,
            max_position_embeddings=1024,
            initializer_range=0.08,
            tie_word_embeddings=True,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def save(model, tokenizer, path):
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)


def _metaspace():
    return tokenizers.pre_tokenizers.Sequence(
        [
            tokenizers.pre_tokenizers.Split(tokenizers.Regex(r"\n+"), "isolated"),
            tokenizers.pre_tokenizers.Metaspace(prepend_scheme="first"),
        ]
    )


def _docstrings_of(path):
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escape sequences in old modules
            tree = ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, ValueError):
        return []  # not valid Python, such as a template
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    return [text for node in ast.walk(tree) if isinstance(node, kinds) and (text := ast.get_docstring(node))]


def write_jsonl(path, texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
