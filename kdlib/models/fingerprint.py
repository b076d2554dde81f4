"""Identity of a run: what must be equal between a checkpoint and the session that resumes it.

**Everything that affects what is learned must be equal; monitoring, saving, batching and paths may differ.** Models,
tokenizers and text are compared by content, so folders may move. Changed `MAY_CHANGE_ON_RESUME` keys take their new
value. Package versions may differ and are reported: the run resumes, but not bit by bit.
"""

import hashlib

import torch

from kdlib.data.dataset import WindowDataset

MAY_CHANGE_ON_RESUME = {
    "teacher", "teacher_cache", "student", "dataset", "eval_dataset", "dataset_split", "text_field",
    "prompt_field", "completion_field", "max_documents", "max_bad_records",  # their content is compared
    "epochs", "batch_size", "grad_accumulation",  # the plan and the windows in a step are compared
    "packing", "loss_chunk_size", "amp_dtype", "teacher_device", "gradient_checkpointing", "share_steps", "log_steps",
    "eval_steps", "save_steps", "keep_checkpoints", "time_budget", "early_stopping_patience", "non_finite_steps",
    "second_copy", "second_copy_saves",
    "check_teacher",
}  # fmt: skip
NAMES = {
    "student": "the student's weights",
    "teacher": "the teacher's weights",
    "signal": "the source of the teacher's signal (live, or a cache)",
    "student_tokenizer": "the student's tokenizer",
    "teacher_tokenizer": "the teacher's tokenizer",
    "text": "the text",
    "windows": "the tokenization of the text",
}


def fingerprint_inputs(teacher, student, teacher_reader, student_reader, documents, windows):
    """Returns `{name: hash}` of all inputs of a run. `teacher`: `fingerprint_teacher`, or a cache's identity.
    `documents` and `windows`: those of the three splits.
    """
    return {
        **teacher,
        "student": fingerprint_model(student),
        "student_tokenizer": _hash([repr(student_reader.vocabulary.tokens).encode()]),
        "teacher_tokenizer": _hash([repr(teacher_reader.vocabulary.tokens).encode()]),
        "text": _hash(repr(document).encode() for split in documents for document in split),
        "windows": _hash(WindowDataset.from_list(split).digest().encode() for split in windows),
    }


def fingerprint_teacher(model):
    """Returns the identity of a live teacher."""
    return {"teacher": fingerprint_model(model), "teacher_dtype": str(model.dtype), "signal": "live"}


def fingerprint_model(model):
    """Returns a hash of a model's weights, by name, shape and value. Of quantised weights only the type counts: their
    rounding differs between devices, and on a CPU bitsandbytes corrupts them when `state_dict` is called.
    """
    digest = hashlib.sha256()
    if getattr(model, "is_quantized", False):
        weights = {name: weight for name, weight in model.named_parameters() if weight.is_floating_point()}
        quantised = [f"{name} {weight.dtype}" for name, weight in model.named_parameters() if name not in weights]
        digest.update(" ".join(quantised).encode())
    else:
        weights = model.state_dict()
    for name, tensor in weights.items():
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def diff_runs(saved, now):
    """Returns `(conflicts, notes)`: lines on differences that prevent resuming a checkpoint, and on those that do not.

    Both arguments are dicts with `config`, `identity` (or None: not compared), `windows_per_step`, `versions`.
    """
    conflicts, notes = [], []
    for key, value in now["config"].items():
        old_value = saved["config"].get(key, value)
        if old_value != value and key not in MAY_CHANGE_ON_RESUME:
            conflicts.append(f"{key} was {old_value!r} and is {value!r}")
    if saved["windows_per_step"] != now["windows_per_step"]:
        conflicts.append(
            f"a step had {saved['windows_per_step']} windows (batch_size x grad_accumulation x processes) and has "
            f"{now['windows_per_step']}"
        )
    old, new = saved["identity"], now["identity"]
    for key in NAMES if old and new else ():
        other_dtype = key == "teacher" and old["teacher_dtype"] != new["teacher_dtype"]
        if old[key] != new[key] and not other_dtype:
            conflicts.append(f"{NAMES[key]} ({old[key][:8]} then, {new[key][:8]} now)")
    if old and new and old["teacher_dtype"] != new["teacher_dtype"]:
        notes.append(f"the teacher ran in {old['teacher_dtype']} and runs in {new['teacher_dtype']}")
    for package, version in now["versions"].items():
        if saved["versions"].get(package) != version:
            notes.append(f"{package} was {saved['versions'].get(package)} and is {version}")
    return conflicts, notes


def _hash(byte_strings):
    digest = hashlib.sha256()
    for data in byte_strings:
        digest.update(len(data).to_bytes(8, "little"))
        digest.update(data)
    return digest.hexdigest()[:16]
