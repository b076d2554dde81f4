"""All configuration keys of a run, as one flat frozen dataclass that is validated at construction."""

import ast
import dataclasses
import datetime
import difflib
import inspect
import itertools
import json
import re
from pathlib import Path

from kdlib import clock

KD_METHODS = ("byte_prefix", "first_token", "shared_vocab", "projector", "chunk_likelihood", "none")
BY_BUCKETS = ("shared_vocab", "first_token", "byte_prefix")
"""Methods that compare distributions over `vocab.Buckets`."""
DIVERGENCES = ("forward_kl", "reverse_kl", "jsd", "skew_forward_kl", "skew_reverse_kl")
CONTROLS = ("full", "short", "off")
AMP_DTYPES = ("auto", "bf16", "fp16", "fp32")
PACKINGS = ("auto", "on", "off")
INPUTS = ("teacher", "student", "dataset")
FEATURES = ("layerwise", "attention", "attention_alignment", "routing_feature", "contrastive")
SHARES = {
    "kd": 0.47, "layerwise": 0.27, "lm": 0.20, "attention_alignment": 0.04, "routing_feature": 0.01, "attention": 0.007,
    "contrastive": 0.007,
}  # fmt: skip
"""Target shares of the loss with `balance auto`; also the weights of the preset `documents`."""
PRESETS = {
    "documents": {
        **{f"{name}_weight": share for name, share in SHARES.items()}, "label_smoothing": 0.1, "kd_temperature": 4.0,
        "use_curriculum": True,
    },
}  # fmt: skip
"""Named sets of values (`preset` in a config file or on the command line). Explicit values override them."""


@dataclasses.dataclass(frozen=True)
class Config:
    """Configuration of one run. Raises ValueError for unknown keys, wrong types and values out of range."""

    teacher: str = ""
    """Hugging Face id or folder of the teacher, a causal language model with its tokenizer."""
    teacher_cache: str = "auto"
    """`live` runs the teacher in every step. `auto` first caches its outputs and unloads it, if training needs two or
    more epochs. Otherwise comma-separated folders of `kdlib cache`, whose top-k log-probabilities replace the teacher."""
    student: str = ""
    """Hugging Face id or folder of the student, a causal language model with its tokenizer."""
    dataset: str = ""
    """Training text: a Hugging Face id (`owner/name` or `owner/name:configuration`), a file (.txt .md .jsonl .json .csv
    .tsv .parquet .arrow, optionally .gz or .zst), a folder of such files, or several of these separated by commas."""
    eval_dataset: str = ""
    """Held-out text, in the same formats. Empty: a tenth of the documents of `dataset`, selected by a hash."""
    dataset_split: str = "train"
    """Split of a dataset from the Hub or stored by `datasets`, for example `train_sft`; from the Hub also `train[:10%]`."""
    text_field: str = "text"
    """Record field that holds the text. The usual forms of conversations and instructions are recognized by their own
    fields; only their answers are trained on."""
    prompt_field: str = ""
    """Record field of a prompt that is not trained on. With `completion_field`, it names the two fields of a record."""
    completion_field: str = ""
    """Record field of the text after the prompt, which is trained on."""
    max_documents: int = 0
    """Largest number of documents of `dataset` to use, chosen by a hash of their content; 0: all."""
    max_bad_records: float = 0.05
    """Largest share of records that may be unusable. They are skipped, counted and named by reason."""
    template_kwargs: str = ""
    """Arguments of both chat templates, as `name=value` separated by commas: `enable_thinking=false,date_string=26 Jul
    2024`. Values are JSON or Python literals, or else strings."""
    template_date: str = ""
    """Date that chat templates print if they ask for the current one, as `2026-07-26`. Empty: the date on which the run
    started, also in its later sessions."""
    learn_thinking: bool = True
    """Trains on the thoughts of answers (`reasoning_content`) that a chat template renders. Most templates render only
    those of the last turn."""
    max_length: int = 384
    """Maximum length of a training window, in student tokens."""
    batch_size: int = 8
    """Windows per forward pass and process."""
    packing: str = "auto"
    """Packs several windows into one row if that reduces padding; attention never crosses windows. `auto`: only models
    whose hidden states stay the same, `on`: raises an error for other models, `off`: one window per row."""
    grad_accumulation: int = 1
    """Forward passes per optimizer step and process."""
    epochs: float = 1.0
    """Passes over the training text. Ignored if `max_steps` is set."""
    max_steps: int = 0
    """Number of optimizer steps; 0 derives it from `epochs`."""
    learning_rate: float = 1e-4
    """Peak learning rate of the student."""
    projector_learning_rate: float = 1e-3
    """Peak learning rate of the projector, which has its own cross-entropy loss."""
    weight_decay: float = 0.01
    """Decoupled weight decay of AdamW, applied to weight matrices only."""
    max_grad_norm: float = 1.0
    """Maximum gradient norm of the student. The projector's gradient is clipped separately."""
    warmup: float = 0.05
    """Fraction of the steps with linear warm-up. A cosine decay to a tenth of the peak follows."""
    kd_method: str = "byte_prefix"
    """Distillation target. `shared_vocab`: probabilities of shared tokens, with one tail bucket. `first_token`: the
    same, but any other token counts as the first token of its split by the other tokenizer. `byte_prefix`:
    `first_token` plus partial tokens (best in RESULTS.md). `projector`: teacher hidden states decoded by the student's
    output head. `chunk_likelihood`: span likelihoods. `none`: no distillation."""
    kd_divergence: str = "forward_kl"
    """Divergence between teacher and student distributions; see `kdlib.losses.divergences.DIVERGENCES`."""
    kd_temperature: float = 1.0
    """Temperature of both distributions. The divergence is multiplied by its square."""
    kd_top_k: int = 0
    """Compares the union of both models' top-k tokens plus one tail bucket; 0 uses the full vocabulary."""
    kd_weight: float = 0.6
    """Weight of the distillation loss; 0.6 with `lm_weight` 0.4 was best on every pair in RESULTS.md."""
    lm_weight: float = 0.4
    """Weight of the next-token cross-entropy. The control trains on this term alone, with weight 1."""
    layerwise_weight: float = 0.0
    """Weight of the cosine distance between hidden states of `feature_layers` layers, through a learned projection."""
    attention_weight: float = 0.0
    """Weight of the attention-map loss over common spans, in the last `attention_layers` layers."""
    attention_alignment_weight: float = 0.0
    """Weight of the query, key and value relation loss, in the last `attention_layers` layers."""
    routing_feature_weight: float = 0.0
    """Weight of the cosine distance to a mixture of teacher layers, which a router selects from the student's state."""
    contrastive_weight: float = 0.0
    """Weight of the InfoNCE loss: the teacher state of the same position against those of other positions."""
    feature_layers: int = 4
    """Student layers compared by `layerwise` and `routing_feature`: evenly spaced, including the last."""
    attention_layers: int = 4
    """Number of last layers whose attention is compared."""
    use_curriculum: bool = False
    """Enables loss terms in stages: `kd` and `lm` from the start, features at 30 % of the steps, all terms at 60 %."""
    balance: str = "off"
    """`off`: fixed weights. `auto`: weights adapt so that each term keeps its share of the loss (kd .47, layerwise .27,
    lm .20, attention_alignment .04, routing_feature .01, attention .007, contrastive .007). Or custom shares:
    `kd=0.5,lm=0.5`."""
    share_steps: int = 100
    """Optimizer steps between measurements of each loss term's gradient; 0: never."""
    non_finite_steps: int = 20
    """Maximum consecutive steps with a NaN or infinite loss or gradient. Such steps are skipped and reported."""
    use_ema: bool = False
    """Keeps an exponential moving average of the student's weights, evaluates both and keeps the better."""
    ema_decay: float = 0.9999
    """Maximum decay of the moving average per optimizer step; it starts as `(1 + n) / (10 + n)`."""
    label_smoothing: float = 0.0
    """Label probability spread over the vocabulary in the training loss, in [0, 1). Evaluation never uses it."""
    loss_chunk_size: int | str = "auto"
    """Rows of the output head computed at once; `auto` uses the free memory. The result does not depend on it."""
    teacher_device: str = "auto"
    """Device of the teacher: `cpu`, `cuda:1`, ... On another device than the student it prefetches one batch. `auto`:
    the second of several GPUs in a single-process run, otherwise the student's device."""
    amp_dtype: str = "auto"
    """Precision of the forward passes: `bf16`, `fp16` or `fp32`. `auto`: bf16 on GPUs with native support, fp16 on
    other GPUs, fp32 on a CPU."""
    gradient_checkpointing: str = "auto"
    """Recomputes student activations in the backward pass: less memory, same result, about a third more time.
    `auto`: only if a step would not fit otherwise."""
    lora_rank: int = 0
    """Rank of low-rank adapters (LoRA): only they are trained, the student's own weights stay frozen. The student is
    exported merged, and its adapters also alone. 0: trains the whole student. Needs peft."""
    lora_alpha: float = 0.0
    """Adapters are scaled by `lora_alpha / lora_rank`; 0: twice the rank."""
    lora_dropout: float = 0.0
    """Dropout on the adapters' input."""
    lora_targets: str = "all-linear"
    """Layers with adapters: `all-linear` (all but the output head), or endings of layer names: `q_proj,v_proj`."""
    lora_init: str = "default"
    """Initial adapters: `default`, `gaussian`, `orthogonal`, or `pissa` and `olora`, which decompose the weights."""
    lora_dora: bool = False
    """Trains direction and magnitude of each adapted weight apart (DoRA)."""
    lora_rslora: bool = False
    """Scales adapters by `lora_alpha / sqrt(lora_rank)` (rsLoRA)."""
    train_embeddings: bool = False
    """Trains embeddings and output head as a whole beside the adapters."""
    student_quantization: str = "none"
    """Quantizes the student's frozen layers to `8bit` or `4bit` (QLoRA) with bitsandbytes; needs `lora_rank`."""
    optimizer: str = "adamw"
    """`adamw`, or `adamw_8bit` (bitsandbytes): 2 bytes of optimizer state per weight instead of 8."""
    teacher_quantization: str = "none"
    """Quantizes the teacher's layers to `8bit` or `4bit` with bitsandbytes; `none` keeps the loaded dtype."""
    eval_steps: int = 0
    """Optimizer steps between evaluations; 0: a twentieth of all steps."""
    eval_tokens: int = 50_000
    """Maximum validation text per evaluation, in student tokens. The test split may have four times as many."""
    log_steps: int = 1
    """Optimizer steps between two `train` records."""
    early_stopping_patience: int = 0
    """Evaluations without improvement after which training stops; 0: never."""
    save_steps: int = 0
    """Optimizer steps between checkpoints. 0: every two minutes, or less often to keep saving below 2 % of the time."""
    keep_checkpoints: int = 2
    """Number of most recent checkpoints to keep. Each also holds the best weights so far."""
    second_copy: str = ""
    """Backup for checkpoints: a private Kaggle dataset (`kaggle:OWNER/NAME`) or Hugging Face repository
    (`hub:OWNER/NAME`). Empty: none."""
    second_copy_saves: int = 5
    """Checkpoints between two uploads to `second_copy`."""
    time_budget: float | str = ""
    """Length of a session: hours, or `11h`, `40m`, `1h30m`, `90s`. The run saves and pauses before it ends; the same
    command resumes it. Empty: no limit."""
    control: str = "short"
    """Cross-entropy-only control run: `full` (same wall-clock time as the distilled run), `short` (a tenth of it, both
    compared at that point), or `off` (no verdict)."""
    repeats: int = 1
    """Independent pairs (distilled, control) with seeds `seed`, `seed + 1`, ... From 2, the interval covers seeds."""
    check_teacher: bool = True
    """Refuses a teacher that scores worse than unigram cross-entropy, which indicates a wrong tokenizer."""
    seed: int = 0
    """Seed of data order, dropout and new weights."""

    def __post_init__(self):
        for field in dataclasses.fields(self):
            object.__setattr__(self, field.name, _validate(field, getattr(self, field.name)))
        for name, choices in _CHOICES.items():
            value = getattr(self, name)
            if value not in choices:
                raise ValueError(f"unknown {name} {value!r}; have {', '.join(choices)}{nearest(value, choices)}")
        for name, (low, high) in _RANGES.items():
            value = getattr(self, name)
            if value != "auto" and not low <= value <= high:
                raise ValueError(f"{name} is {value}; it must lie between {low} and {high}")
        for name, (pattern, expected) in _PATTERNS.items():
            if not re.fullmatch(pattern, getattr(self, name)):
                raise ValueError(f"unknown {name} {getattr(self, name)!r}; have {expected}")
        if not self.lm_weight + sum(self._teacher_weights()) > 0:
            raise ValueError("all loss weights are 0, so nothing would be learned; set kd_weight or lm_weight above 0")
        if self.kd_top_k and self.kd_method == "chunk_likelihood":
            raise ValueError("kd_top_k truncates distributions, but chunk_likelihood compares none; set kd_top_k to 0")
        self.target_shares()
        self.template_arguments()
        if self.template_date:
            _check_date(self.template_date)
        self._check_lora()

    def _check_lora(self):
        """Raises ValueError for settings of adapters without adapters, or that exclude each other."""
        names = [name for name, _ in flags() if name.startswith("lora_")] + ["train_embeddings", "student_quantization"]
        changed = [name for name in names if getattr(self, name) != getattr(Config, name)]
        if changed and not self.lora_rank:
            raise ValueError(
                f"{changed[0]} is {getattr(self, changed[0])}, but lora_rank is 0, so there are no adapters; set lora_rank"
            )
        if self.student_quantization != "none" and (self.lora_dora or self.lora_init in ("pissa", "olora")):
            reason = "lora_dora" if self.lora_dora else f"lora_init {self.lora_init}"
            raise ValueError(f"{reason} changes the weights that student_quantization quantizes; use one of them")

    def _teacher_weights(self):
        names = FEATURES if self.kd_method == "none" else ("kd", *FEATURES)
        return [getattr(self, f"{name}_weight") for name in names]

    @property
    def needs_teacher(self):
        """Whether any loss term reads the teacher."""
        return self.kd_method != "none" or any(weight > 0 for weight in self._teacher_weights())

    @property
    def cached(self):
        """Whether existing teacher caches replace the teacher."""
        return self.teacher_cache not in ("auto", "live")

    def control_config(self):
        """Returns the configuration of the control: next-token cross-entropy only, without a teacher."""
        off = {f"{name}_weight": 0.0 for name in FEATURES}
        return self.replace(kd_method="none", kd_top_k=0, lm_weight=1.0, use_curriculum=False, balance="off", **off)

    @property
    def effective_batch(self):
        """Windows per optimizer step and process."""
        return self.batch_size * self.grad_accumulation

    def target_shares(self):
        """Returns the target shares of the loss, `{term: share}`, or None if `balance` is off."""
        if self.balance in ("off", "auto"):
            return dict(SHARES) if self.balance == "auto" else None
        shares = {}
        for entry in self.balance.split(","):
            name, _, share = (word.strip() for word in entry.partition("="))
            try:
                shares[name] = float(share)
            except ValueError:
                raise ValueError(
                    f"balance {self.balance!r}: expected off, auto, or shares like kd=0.5,lm=0.5"
                ) from None
            if name not in SHARES:
                raise ValueError(f"balance names {name!r}{nearest(name, SHARES) or '; have ' + ', '.join(SHARES)}")
            if not 0 < shares[name] < 10**6:
                raise ValueError(f"balance gives {name} the share {share}; a share is above 0 and below 1000000")
        return shares

    def template_arguments(self):
        """Returns the arguments of chat templates, `{name: value}`."""
        arguments = {}
        for entry in filter(None, re.split(r",(?=\s*\w+\s*=)", self.template_kwargs)):
            name, mark, text = (part.strip() for part in entry.partition("="))
            if not (name.isidentifier() and mark):
                raise ValueError(f"template_kwargs {entry!r}: expected name=value, like enable_thinking=false")
            if name in RESERVED_ARGUMENTS:
                advice = "; set template_date" if name == "strftime_now" else ""
                raise ValueError(f"template_kwargs sets {name}, which kdlib sets itself{advice}")
            arguments[name] = _parse_literal(text)
        return arguments

    def require_inputs(self):
        """Raises ValueError unless teacher, student and dataset are set."""
        for name in INPUTS:
            if not getattr(self, name) and not (name == "teacher" and self.cached):
                raise ValueError(
                    f"{name} is missing: a run takes teacher, student and dataset, each a Hugging Face id or a local path"
                )

    def require_all_or_no_inputs(self):
        """Raises ValueError if some but not all of teacher, student and dataset are set."""
        if any(getattr(self, name) for name in INPUTS):
            self.require_inputs()

    def replace(self, **changes):
        """Returns a validated copy with changed values."""
        return Config.from_dict({**self.to_dict(), **changes})

    def to_dict(self):
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values):
        """Builds a config from a mapping. Keys may use hyphens; `preset` supplies values that are not given."""
        keys = [field.name for field in dataclasses.fields(cls)]
        values = {str(key).replace("-", "_"): value for key, value in values.items()}
        if "preset" in values:
            preset = values.pop("preset")
            if preset not in PRESETS:
                raise ValueError(f"unknown preset {preset!r}; have {', '.join(PRESETS)}{nearest(preset, PRESETS)}")
            values = {**PRESETS[preset], **values}
        if unknown := next((name for name in values if name not in keys), ""):
            raise ValueError(f"unknown key {unknown!r}{nearest(unknown, keys) or '; have ' + ', '.join(keys)}")
        return cls(**values)

    @classmethod
    def from_json(cls, path):
        """Loads a file with one JSON object of config keys."""
        try:
            values = json.loads(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise ValueError(f"cannot read the config {path}: {error.strerror or error}") from None
        except ValueError as error:
            raise ValueError(f"{path} is not JSON: {error}") from None
        if not isinstance(values, dict):
            raise ValueError(f"{path} holds a {type(values).__name__}; expected one object of config keys")
        return cls.from_dict(values)


RESERVED_ARGUMENTS = {
    "messages", "conversation", "tools", "chat_template", "add_generation_prompt", "continue_final_message", "tokenize",
    "return_dict", "return_tensors", "return_assistant_tokens_mask", "strftime_now",
}  # fmt: skip
"""Arguments of `apply_chat_template` and of templates that `template_kwargs` cannot set."""
_CHOICES = {
    "kd_method": KD_METHODS, "kd_divergence": DIVERGENCES, "control": CONTROLS, "amp_dtype": AMP_DTYPES,
    "packing": PACKINGS, "gradient_checkpointing": ("auto", "on", "off"), "optimizer": ("adamw", "adamw_8bit"),
    "teacher_quantization": ("none", "8bit", "4bit"), "student_quantization": ("none", "8bit", "4bit"),
    "lora_init": ("default", "gaussian", "orthogonal", "pissa", "olora"),
}  # fmt: skip

AUTO, DURATION = int | str, float | str
_HUGE = 10**12
_COPIES = r"|kaggle:[\w-]+/(?!-)[a-z0-9-]{6,50}(?<!-)|hub:[\w.-]+/[\w.-]+"
_PATTERNS = {
    "teacher_cache": (r".+", "auto, live, or the folders of a teacher cache"),
    "teacher_device": (r"auto|cpu|cuda(:\d+)?", "auto, cpu, cuda:0, cuda:1, ..."),
    "template_date": (r"|\d{4}-\d\d-\d\d", "a date, as 2026-07-26"),
    "second_copy": (_COPIES, "kaggle:OWNER/NAME (NAME: 6-50 of a-z 0-9 -) or hub:OWNER/NAME"),
}  # fmt: skip
_RANGES = {
    "max_documents": (0, _HUGE), "max_bad_records": (0.0, 1.0),
    "max_length": (4, 10**6), "batch_size": (1, 10**6), "grad_accumulation": (1, 10**6), "epochs": (1e-6, 10**6),
    "max_steps": (0, _HUGE), "learning_rate": (0.0, 10.0), "projector_learning_rate": (0.0, 10.0),
    "weight_decay": (0.0, 10.0), "max_grad_norm": (1e-9, _HUGE), "warmup": (0.0, 1.0),
    "kd_temperature": (0.05, 100.0), "kd_weight": (0.0, 10.0**6), "lm_weight": (0.0, 10.0**6),
    "label_smoothing": (0.0, 0.99), "loss_chunk_size": (1, 10**9), "kd_top_k": (0, 10**9),
    **{f"{name}_weight": (0.0, 10.0**6) for name in FEATURES}, "feature_layers": (1, 10**4),
    "attention_layers": (1, 10**4), "share_steps": (0, _HUGE), "non_finite_steps": (1, _HUGE),
    "eval_steps": (0, _HUGE), "save_steps": (0, _HUGE), "second_copy_saves": (1, _HUGE),
    "keep_checkpoints": (1, 10**6), "ema_decay": (0.0, 1.0),
    "eval_tokens": (16, _HUGE), "log_steps": (1, _HUGE), "early_stopping_patience": (0, _HUGE), "repeats": (1, 1000),
    "lora_rank": (0, 10**4), "lora_alpha": (0.0, 10.0**6), "lora_dropout": (0.0, 0.99), "seed": (0, 2**31 - 1),
}  # fmt: skip


def flags():
    """Returns `(name, dataclass field)` of all config keys, in order."""
    return [(field.name, field) for field in dataclasses.fields(Config)]


def docstrings():
    """Returns `{key: text}`: the docstring under each field of `Config`, on one line."""
    body = ast.parse(inspect.getsource(Config)).body[0].body
    return {
        field.target.id: " ".join(text.value.value.split())
        for field, text in itertools.pairwise(body)
        if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr)
    }


def parse_flag(name, text):
    """Parses the text of a command-line flag by the field's type. Raises ValueError for text of another type."""
    if name == "preset":
        return text
    field = dict(flags())[name]
    if field.type == AUTO:
        return text if text == "auto" else int(text) if text.lstrip("-").isdigit() else _validate(field, text)
    if field.type == DURATION:
        return text
    if field.type is bool:
        booleans = dict.fromkeys(("true", "1", "yes", "on"), True) | dict.fromkeys(("false", "0", "no", "off"), False)
        if text.lower() not in booleans:
            raise ValueError(f"{name} takes true or false, got {text!r}")
        return booleans[text.lower()]
    if field.type in (int, float):
        try:
            number = float(text)
        except ValueError:
            raise ValueError(f"{name} takes {_type_name(field.type)}, got {text!r}") from None
        return int(number) if field.type is int and number.is_integer() else number
    return text


def _validate(field, value):
    kind = field.type
    if kind == AUTO:
        if value == "auto" or (isinstance(value, int) and not isinstance(value, bool)):
            return value
        raise ValueError(f"{field.name} takes a whole number or auto, got {value!r}")
    if kind == DURATION and isinstance(value, (int, float, str)) and not isinstance(value, bool):
        clock.parse_duration(value)
        return value
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if not isinstance(value, kind) or (kind is not bool and isinstance(value, bool)) or value != value:
        raise ValueError(f"{field.name} takes {_type_name(kind)}, got {value!r}")
    return value


def _check_date(text):
    try:
        datetime.date.fromisoformat(text)
    except ValueError as error:
        raise ValueError(f"template_date {text!r} is no date: {error}") from None


def _parse_literal(text):
    """Parses a JSON or Python literal. Other text is returned unchanged."""
    for parse in (json.loads, ast.literal_eval):
        try:
            return parse(text)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            pass
    return text


def _type_name(kind):
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "a string"}
    return names.get(kind, "a duration")


def nearest(name, choices, mark=""):
    """Returns `; did you mean 'kd_top_k'?` if one of `choices` resembles `name`, otherwise an empty string."""
    close = difflib.get_close_matches(str(name), list(choices), n=1, cutoff=0.6)
    return f"; did you mean {mark + close[0]!r}?" if close else ""
