"""Teacher and student, loaded and checked against each other."""

import dataclasses

import torch

from kdlib.align import vocab
from kdlib.data import tokenize
from kdlib.data.dataset import WindowDataset
from kdlib.models import loading, teacher_cache
from kdlib.models.prefetch import PrefetchingTeacher
from kdlib.models.teacher import Teacher


class IncompatiblePairError(ValueError):
    """What was named is there, and does not fit together: the `problem`, and the `remedy`."""

    def __init__(self, problem, remedy):
        super().__init__(f"{problem}; {remedy}")
        self.problem, self.remedy = problem, remedy


@dataclasses.dataclass
class Pair:
    """A teacher and a student that have been checked against each other. `pads`: padding ids of student and teacher;
    `widest`: how wide their rows of several windows may be, 0 where they can't be shared; `buckets`: the `vocab.Buckets` by
    `kd_method`, and the `trie.Trie`s, as far as they were asked for; `sample`: training windows that features are
    measured on; `text`: those that tell which buckets to join.
    """

    teacher: Teacher
    student: torch.nn.Module
    student_reader: tokenize.TextTokenizer
    head: loading.Head
    shared: vocab.SharedVocabulary
    pads: tuple
    widest: tuple = (0, 0)
    buckets: dict = dataclasses.field(default_factory=dict)
    sample: list = dataclasses.field(default_factory=list)
    text: WindowDataset | list = dataclasses.field(default_factory=list)


def load_pair(config, device, teacher_dtype, teacher_device=None, on_progress=lambda phase, done, total: None):
    """Load teacher and student, each with its own tokenizer; ValueError where nothing connects them. A teacher with another
    `teacher_device` than the student's `device` works one batch ahead.
    """
    on_progress("loading the teacher", 0, 0)
    teacher = load_teacher(config, torch.device(device), teacher_dtype, torch.device(teacher_device or device))
    on_progress("loading the student", 0, 0)
    student = loading.load_model(config.student, "student", device=device)
    student_reader = loading.load_reader(config.student, "student", student.config)
    shared = vocab.shared_vocabulary(student_reader.vocabulary, teacher.reader.vocabulary)
    if not len(shared):
        raise IncompatiblePairError(
            "the two tokenizers have no token in common; nothing can be carried from teacher to student",
            "take a student or a teacher with another tokenizer",
        )
    pads = tuple(reader.tokenizer.pad_token_id or 0 for reader in (student_reader, teacher.reader))
    head = loading.Head(student, student_reader.vocabulary)
    return Pair(teacher, student, student_reader, head, shared, pads)


def load_teacher(config, device, dtype, away):
    """The live teacher, or the one that a cache stands for: then nothing but its tokenizer is loaded."""
    if not config.cached:
        model = loading.load_model(config.teacher, "teacher", dtype, away, config.teacher_quantization)
        reader = loading.load_reader(config.teacher, "teacher", model.config)
        return Teacher(model, reader) if away == device else PrefetchingTeacher(model, reader, device)
    cached = teacher_cache.CachedTeacher(teacher_cache.folders_of(config.teacher_cache))
    teacher_cache.refuse_settings(config, cached.settings)
    if config.teacher:
        named = loading.load_reader(config.teacher, "teacher")
        if named.vocabulary != cached.reader.vocabulary:
            raise ValueError(f"the teacher cache was written by a teacher with another tokenizer than {config.teacher}")
    return cached
