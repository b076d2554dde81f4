"""The embedded default: a whole distillation from nothing but Python itself.

Real text that every Python has (the docstrings of its standard library, split by module so that nothing leaks), two
tokenizers of different families trained on it, a teacher trained on all of it, and a fresh student whose own text is
scarce. Made once and kept in the user's cache folder.
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
from kdlib.data.corpus import Document
from kdlib.models import devices, loading
from kdlib.training import loop
from kdlib.training.objective import Objective

RECIPE = 2
"""Goes up when anything below changes what is made, so that an old cache is not taken for a new one."""

LEFT_OUT = {"test", "tests", "idlelib", "lib2to3", "turtledemo", "site-packages", "dist-packages", "__pycache__"}
TEACHER = {"vocab": 2048, "width": 128, "layers": 4, "heads": 4, "steps": 1200}
STUDENT = {"vocab": 1024, "width": 64, "layers": 2, "heads": 4}
STUDENT_CHARS = 200_000
WINDOW = 128
WAIT_S = 1.0
TEACHER_CONFIG = Config(
    max_length=WINDOW, batch_size=8, learning_rate=3e-3, weight_decay=0.1, kd_method="none", lm_weight=1.0, warmup=0.03
)


def docstrings(chars=math.inf):
    """Documents of the running Python's standard library: `{module: text}`, every docstring once. Of about `chars`
    characters where that is less than all: then modules are taken in an order that mixes them.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    seen, texts, paths = set(), {}, sorted(root.rglob("*.py"))
    if math.isfinite(chars):
        paths.sort(key=lambda path: hashlib.sha256(path.relative_to(root).as_posix().encode()).digest()[::-1])
    for path in paths:
        if sum(map(len, texts.values())) >= chars:
            break
        module = path.relative_to(root)
        if LEFT_OUT & set(module.parts):
            continue
        found = [text for text in _docstrings_of(path) if text not in seen]
        seen.update(found)
        if found:
            texts[module.as_posix()] = "\n\n".join(found)
    return texts


def split(texts, student_chars=STUDENT_CHARS):
    """`(teacher's, student's, held-out)` lists of texts. A held-out module is seen by nobody, and the student's own text
    is a small part of the teacher's.
    """
    known, held = [], []
    for module, text in texts.items():
        place = hashlib.sha256(module.encode()).digest()[0]
        (held if place < 32 else known).append((module, text))
    order = sorted(known, key=lambda item: hashlib.sha256(item[0].encode()).hexdigest())
    own, size = [], 0
    for _, text in order:
        if size < student_chars:
            own.append(text)
            size += len(text)
    return [text for _, text in known], own, [text for _, text in held]


def folder(cache):
    """Where the embedded default of this Python lies below a cache folder."""
    return (
        Path(cache) / f"tiny-{RECIPE}-python{sys.version_info.major}.{sys.version_info.minor}.{sys.version_info.micro}"
    )


def is_ready(cache):
    return (folder(cache) / "complete.json").exists()


def config(cache, **changes):
    """The `Config` of the embedded default: what `kdlib demo` runs."""
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
    """The `Config` of the embedded default in a small form, as `prepare` makes it; made once and kept. For models of this
    size one torch thread is fastest, and is set.
    """
    torch.set_num_threads(1)
    cache = environment.cache_folder() / f"small-{steps}-{student_chars}-{chars}"
    if not is_ready(cache):
        for _progress in prepare(cache, steps=steps, student_chars=student_chars, chars=chars):
            pass
    return config(cache, **changes)


def prepare(cache, clock=None, steps=TEACHER["steps"], student_chars=STUDENT_CHARS, chars=math.inf):
    """Make the embedded default below `cache`; a generator of `(what, done, total)` that says how far it is. `steps`:
    how long its teacher is trained; `student_chars`: how much text of its own the student gets; `chars`: of how much text in
    all.

    Nothing half-made is ever taken for whole. If another process is making it, this one waits and takes what it made.
    """
    home = folder(cache)
    home.parent.mkdir(parents=True, exist_ok=True)
    lock, waited = filelock.FileLock(home.with_name(home.name + ".lock")), False
    while not lock.is_locked:
        with contextlib.suppress(filelock.Timeout):
            lock.acquire(timeout=WAIT_S)
            break
        waited = True
        yield "another process makes the embedded default", 0, 0
    try:
        if not (waited and is_ready(cache)):
            yield from _make(home, clock or Clock(), steps, student_chars, chars)
    finally:
        lock.release()


def _make(home, clock, steps, student_chars, chars):
    with files.atomic(home) as beside:
        beside.mkdir()
        yield "reading the standard library's docstrings", 0, 0
        teacher_texts, student_texts, held = split(docstrings(chars), student_chars)
        write_jsonl(beside / "train.jsonl", student_texts)
        write_jsonl(beside / "held_out.jsonl", held)
        yield "training two tokenizers", 0, 0
        teacher_tokenizer = byte_level_bpe(teacher_texts, TEACHER["vocab"])
        student_tokenizer = unigram(teacher_texts, STUDENT["vocab"])
        torch.manual_seed(0)
        teacher = llama(teacher_tokenizer, **TEACHER)
        for record in train_teacher(teacher, teacher_tokenizer, teacher_texts, clock, steps):
            yield "training the teacher, once", record.step, steps
        save(teacher, teacher_tokenizer, beside / "teacher")
        torch.manual_seed(0)
        save(llama(student_tokenizer, **STUDENT), student_tokenizer, beside / "student")
        (beside / "complete.json").write_text(json.dumps({"recipe": RECIPE, "bytes": sum(map(len, teacher_texts))}))


def train_teacher(model, tokenizer, texts, clock, steps):
    """Plain next-token training through kdlib's own loop; a generator of its records."""
    reader = tokenize.wrap_tokenizer(tokenizer, loading.vocab.read_vocabulary(tokenizer))
    windows = []
    for number, text in enumerate(texts):
        encoded = tokenize.encode(Document(text), reader)
        windows += windowing.cut_windows(
            Document(text), encoded, encoded, reader, reader, TEACHER_CONFIG.max_length, number
        )
    objective = Objective(model, loading.Head(model, reader.vocabulary), TEACHER_CONFIG)
    with devices.temporary_accelerator("fp32", cpu=True) as machine:
        yield from loop.TrainLoop(objective, None, windows, steps, TEACHER_CONFIG, machine, clock)


def byte_level_bpe(texts, size):
    """GPT-2's kind: every byte has a token, a word keeps the space in front of it."""
    core = tokenizers.Tokenizer(tokenizers.models.BPE())
    core.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(texts, trainer)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<|endoftext|>", pad_token="<|endoftext|>"
    )


def unigram(texts, size):
    """SentencePiece's kind: a Unigram model with a leading-space mark, byte pieces for what it has no piece for, and
    <s> in front of every text.
    """
    core = tokenizers.Tokenizer(tokenizers.models.Unigram())
    core.pre_tokenizer = _metaspace()
    special = ["<unk>", "<s>", "</s>"]
    trainer = tokenizers.trainers.UnigramTrainer(
        vocab_size=size - 256, special_tokens=special, unk_token="<unk>", show_progress=False
    )
    core.train_from_iterator(texts, trainer)
    pieces = [(piece, round(score, 6)) for piece, score in json.loads(core.to_str())["model"]["vocab"]]
    learned = _settled(pieces[len(special) :])
    byte_pieces = [(f"<0x{byte:02X}>", learned[-1][1] - 10.0) for byte in range(256)]
    vocabulary = pieces[: len(special)] + byte_pieces + learned
    core = tokenizers.Tokenizer(tokenizers.models.Unigram(vocabulary, unk_id=0, byte_fallback=True))
    core.pre_tokenizer = _metaspace()
    core.decoder = tokenizers.decoders.Sequence(
        [tokenizers.decoders.ByteFallback(), tokenizers.decoders.Metaspace(prepend_scheme="first")]
    )
    core.add_special_tokens(special)
    core.post_processor = tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="</s>"
    )


def _settled(pieces, rung=1e-4):
    """The same `(piece, score)`s from every run, likeliest first. The trainer adds up in any order, so that last digits and
    the order of equals differ; and characters that it can do without it hangs in any order on a ladder above the lowest.
    """
    learned = sorted(pieces, key=lambda entry: (-entry[1], entry[0]))
    singles = [entry for entry in learned if len(entry[0]) == 1]
    low = [entry for entry in singles if entry[1] <= learned[-1][1] + rung * len(singles)]
    settled = dict(zip(sorted(piece for piece, _ in low), [score for _, score in low], strict=True))
    return sorted(
        ((piece, settled.get(piece, score)) for piece, score in learned), key=lambda entry: (-entry[1], entry[0])
    )


def llama(tokenizer, width, layers, heads, vocab=None, steps=None):
    """A small Llama-shaped model with new weights. A wide start (0.08) learns much faster at this size."""
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
            warnings.simplefilter("ignore")  # invalid escapes in old modules
            tree = ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, ValueError):
        return []  # a template or a test of the parser, not a module
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    return [text for node in ast.walk(tree) if isinstance(node, kinds) and (text := ast.get_docstring(node))]


def write_jsonl(path, texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
