"""Which run is this? What a checkpoint must share with the session that goes on with it.

The rule: **what decides what is learned, from what, must be the same; what decides how it is watched, saved, cut up or
where it lies may differ.** Models, tokenizers and text are compared by their content, so folders may move. A changed
`MAY_CHANGE_ON_RESUME` key is taken as it is now. Versions may differ, and are told: the run goes on, but not to the last bit.
"""

import hashlib

import torch

from kdlib.data.dataset import WindowDataset

MAY_CHANGE_ON_RESUME = {
    "teacher", "teacher_cache", "student", "dataset", "eval_dataset", "text_field",  # their content is compared
    "epochs", "batch_size", "grad_accumulation",  # the plan and the windows in a step are compared
    "packing", "loss_chunk_size", "amp_dtype", "teacher_device", "gradient_checkpointing", "share_steps", "log_steps",
    "eval_steps", "save_steps", "keep_checkpoints", "time_budget", "early_stopping_patience", "non_finite_steps",
    "second_copy", "second_copy_saves",
    "check_teacher",
}  # fmt: skip
NAMES = {
    "student": "the student's weights",
    "teacher": "the teacher's weights",
    "signal": "what is known of the teacher (live, or a cache)",
    "student_tokenizer": "the student's tokenizer",
    "teacher_tokenizer": "the teacher's tokenizer",
    "text": "the text",
    "windows": "how the text is cut into tokens",
}


def fingerprint_inputs(teacher, student, teacher_reader, student_reader, documents, windows):
    """`{name: hash}` of all that a run starts from. `teacher`: `fingerprint_teacher`, or what a cache knows of its own; `documents`
    and `windows`: those of training, validation and test.
    """
    return {
        **teacher,
        "student": fingerprint_model(student),
        "student_tokenizer": _hash([repr(student_reader.vocabulary.tokens).encode()]),
        "teacher_tokenizer": _hash([repr(teacher_reader.vocabulary.tokens).encode()]),
        "text": _hash(repr(document).encode() for part in documents for document in part),
        "windows": _hash(WindowDataset.from_list(part).digest().encode() for part in windows),
    }


def fingerprint_teacher(model):
    """What a live teacher is known by."""
    return {"teacher": fingerprint_model(model), "teacher_dtype": str(model.dtype), "signal": "live"}


def fingerprint_model(model):
    """Hash of a model's weights, by name, shape and value. A quantised model is told by those that were left whole, and of
    the others by their type: their rounding differs from device to device, and on a CPU bitsandbytes spoils them when they
    are asked for.
    """
    digest = hashlib.sha256()
    if getattr(model, "is_quantized", False):
        weights = {name: weight for name, weight in model.named_parameters() if weight.is_floating_point()}
        rounded = [f"{name} {weight.dtype}" for name, weight in model.named_parameters() if name not in weights]
        digest.update(" ".join(rounded).encode())
    else:
        weights = model.state_dict()
    for name, tensor in weights.items():
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def diff_runs(then, now):
    """`(refused, told)`: lines on what keeps a session from going on with a checkpoint, and on what only is to be known.

    Both are dicts with `config`, `identity` (or None: not compared), `windows_per_step`, `versions`.
    """
    refused, told = [], []
    for key, value in now["config"].items():
        before = then["config"].get(key, value)
        if before != value and key not in MAY_CHANGE_ON_RESUME:
            refused.append(f"{key} was {before!r} and is {value!r}")
    if then["windows_per_step"] != now["windows_per_step"]:
        refused.append(
            f"a step had {then['windows_per_step']} windows (batch_size x grad_accumulation x processes) and has "
            f"{now['windows_per_step']}"
        )
    old, new = then["identity"], now["identity"]
    for key in NAMES if old and new else ():
        other_dtype = key == "teacher" and old["teacher_dtype"] != new["teacher_dtype"]
        if old[key] != new[key] and not other_dtype:
            refused.append(f"{NAMES[key]} ({old[key][:8]} then, {new[key][:8]} now)")
    if old and new and old["teacher_dtype"] != new["teacher_dtype"]:
        told.append(f"the teacher ran in {old['teacher_dtype']} and runs in {new['teacher_dtype']}")
    for package, version in now["versions"].items():
        if then["versions"].get(package) != version:
            told.append(f"{package} was {then['versions'].get(package)} and is {version}")
    return refused, told


def _hash(pieces):
    digest = hashlib.sha256()
    for piece in pieces:
        digest.update(len(piece).to_bytes(8, "little"))
        digest.update(piece)
    return digest.hexdigest()[:16]
