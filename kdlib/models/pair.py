"""Loads a teacher and a student and checks that they fit together."""

import dataclasses

import torch

from kdlib.align import vocab
from kdlib.data import tokenize
from kdlib.data.dataset import WindowDataset
from kdlib.models import loading, teacher_cache
from kdlib.models.head import Head
from kdlib.models.prefetch import PrefetchingTeacher
from kdlib.models.teacher import Teacher


class IncompatiblePairError(ValueError):
    """Inputs that exist but do not fit together. Has a `problem` and a `remedy`."""

    def __init__(self, problem, remedy):
        super().__init__(f"{problem}; {remedy}")
        self.problem, self.remedy = problem, remedy


@dataclasses.dataclass
class Pair:
    """A teacher and a student that fit together. `pads`: padding ids of student and teacher. `max_row_width`: maximum
    width of their packed rows, 0 without packing. `buckets`: cache of the `vocab.Buckets` and tries of `trie`.
    `sample`: training windows that features are measured on. `text`: training windows that determine which buckets to
    join.
    """

    teacher: Teacher
    student: torch.nn.Module
    student_reader: tokenize.TextTokenizer
    head: Head
    shared: vocab.SharedVocabulary
    pads: tuple
    max_row_width: tuple = (0, 0)
    buckets: dict = dataclasses.field(default_factory=dict)
    sample: list = dataclasses.field(default_factory=list)
    text: WindowDataset | list = dataclasses.field(default_factory=list)


def load_pair(config, device, teacher_dtype, teacher_device=None, on_progress=lambda phase, done, total: None):
    """Loads teacher and student with their tokenizers. Raises `IncompatiblePairError` if these share no token. A
    teacher on another device than the student's prefetches one batch.
    """
    on_progress("loading the teacher", 0, 0)
    teacher = load_teacher(config, torch.device(device), teacher_dtype, torch.device(teacher_device or device))
    on_progress("loading the student", 0, 0)
    dtype = teacher_dtype if config.lora_rank else torch.float32  # frozen weights need no precision for updates
    student = loading.load_model(config.student, "student", dtype, device, config.student_quantization)
    student_reader = loading.load_reader(config.student, "student", student.config)
    shared = vocab.shared_vocabulary(student_reader.vocabulary, teacher.reader.vocabulary)
    if not len(shared):
        raise IncompatiblePairError(
            "the two tokenizers have no token in common, so the student cannot learn from the teacher",
            "use a student or a teacher with another tokenizer",
        )
    pads = tuple(reader.tokenizer.pad_token_id or 0 for reader in (student_reader, teacher.reader))
    head = Head(student, student_reader.vocabulary)
    return Pair(teacher, student, student_reader, head, shared, pads)


def load_teacher(config, device, dtype, teacher_device):
    """Loads the live teacher, or opens its cache, which needs the tokenizer only."""
    if not config.cached:
        model = loading.load_model(config.teacher, "teacher", dtype, teacher_device, config.teacher_quantization)
        reader = loading.load_reader(config.teacher, "teacher", model.config)
        return Teacher(model, reader) if teacher_device == device else PrefetchingTeacher(model, reader, device)
    cached = teacher_cache.CachedTeacher(teacher_cache.folders_of(config.teacher_cache))
    teacher_cache.check_settings(config, cached.settings)
    if config.teacher:
        reader = loading.load_reader(config.teacher, "teacher")
        if reader.vocabulary != cached.reader.vocabulary:
            raise ValueError(f"the teacher cache was written by a teacher with another tokenizer than {config.teacher}")
    return cached
