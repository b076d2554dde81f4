"""The one list of everything a run can be told: a flat, frozen record, checked where it is made."""

import dataclasses
import difflib
import json
import re
from pathlib import Path

from kdlib import clock

KD_METHODS = ("inside_tokens", "shared_prefix", "shared_vocab", "projector", "chunk_likelihood", "none")
BY_BUCKETS = ("shared_vocab", "shared_prefix", "inside_tokens")
"""Ways to distil that compare `vocab.Buckets`."""
DIVERGENCES = ("forward_kl", "reverse_kl", "jsd", "skew_forward_kl", "skew_reverse_kl")
CONTROLS = ("full", "short", "off")
AMP_DTYPES = ("auto", "bf16", "fp16", "fp32")
PACKINGS = ("auto", "on", "off")
FEATURES = ("layerwise", "attention", "attention_alignment", "routing_feature", "contrastive")
SHARES = {
    "kd": 0.47, "layerwise": 0.27, "lm": 0.20, "attention_alignment": 0.04, "routing_feature": 0.01, "attention": 0.007,
    "contrastive": 0.007,
}  # fmt: skip
"""Target shares of the loss under `balance auto`, and the weights of the preset `documents`."""
PRESETS = {
    "documents": {
        **{f"{name}_weight": share for name, share in SHARES.items()}, "label_smoothing": 0.1, "kd_temperature": 4.0,
        "use_curriculum": True,
    },
}  # fmt: skip
"""Bundles of values under one name: `preset documents` in a config or on the command line; values beside it win."""


@dataclasses.dataclass(frozen=True)
class Config:
    """One run. Wrong names, types or values raise ValueError with one line that says what to write instead."""

    teacher: str = ""
    """Hugging Face id or folder of the teacher: a causal language model with its own tokenizer."""
    teacher_cache: str = "auto"
    """`auto`: where the plan goes over its text twice or more and a cache holds all it learns from, the teacher reads once
    first and is let go (better in the same time, RESULTS.md). `live`: never. Else folders of teacher caches (`kdlib cache`),
    by commas: the teacher is never loaded, its likeliest tokens and one tail stand for its distribution."""
    student: str = ""
    """Hugging Face id or folder of the student: a causal language model with its own tokenizer."""
    dataset: str = ""
    """Hugging Face id (`owner/name` or `owner/name:configuration`), a file (.txt .md .jsonl .json .csv .tsv .parquet, or
    .gz of these), a folder of such files, or several of these separated by commas."""
    eval_dataset: str = ""
    """Held-out text in the same forms. Empty: a tenth of the documents of `dataset`, chosen by their content."""
    text_field: str = "text"
    """Field of a record that holds its text; a record with `messages` is a conversation, learned on its answers only."""
    max_length: int = 384
    """Student tokens in one window of text, at most."""
    batch_size: int = 8
    """Windows in one forward pass of one process."""
    packing: str = "auto"
    """Whether windows share rows of a batch, each seeing only itself, where that computes less padding: `auto`, student and
    teacher each if it gives the same hidden states that way; `on` refuses a model that does not; `off`: each window has a
    row. The result stays the same."""
    grad_accumulation: int = 1
    """Forward passes of one process in one optimizer step."""
    epochs: float = 1.0
    """Passes over the training text, where `max_steps` is 0."""
    max_steps: int = 0
    """Optimizer steps of the whole plan; 0: as many as `epochs` passes need."""
    learning_rate: float = 1e-4
    """Peak learning rate of the student."""
    projector_learning_rate: float = 1e-3
    """Peak learning rate of the projector, trained by its own cross-entropy."""
    weight_decay: float = 0.01
    """AdamW's decoupled weight decay, on matrices only."""
    max_grad_norm: float = 1.0
    """Gradient norm above which the student's gradient is scaled down; the projector's is clipped by itself."""
    warmup: float = 0.05
    """Fraction of the planned steps spent in linear warm-up; a cosine to a tenth of the peak follows."""
    kd_method: str = "inside_tokens"
    """What the student matches: `inside_tokens` (`shared_prefix`, and where one side is inside a token of the other, what
    this one said at its beginning, given the part read since; the best of all in RESULTS.md, "Quality against every known
    way"), `shared_prefix` (probabilities of the tokens both vocabularies hold, a token of one side only counting with the
    one that the other side would read first), `shared_vocab` (the same with one tail bucket for the rest), `projector`
    (the teacher's last state by the student's head), `chunk_likelihood` (how likely either finds each span), or `none`."""
    kd_divergence: str = "forward_kl"
    """How the two distributions are compared; see `kdlib.losses.divergences.DIVERGENCES`."""
    kd_temperature: float = 1.0
    """Both distributions are softened by this; the divergence is multiplied by its square."""
    kd_top_k: int = 0
    """Compare only the likeliest k of either side, each once, and one tail for the rest; 0: all."""
    kd_weight: float = 0.6
    """Weight of the distillation loss; the best beside 0.4 on every pair of RESULTS.md's table."""
    lm_weight: float = 0.4
    """Weight of the next-token cross-entropy; the control trains on this part alone, at weight 1."""
    layerwise_weight: float = 0.0
    """Weight of the direction of hidden states in `feature_layers` layers, through a learned map; in [0, 2]."""
    attention_weight: float = 0.0
    """Weight of the attention maps over common spans, last `attention_layers` layers."""
    attention_alignment_weight: float = 0.0
    """Weight of the relations among queries, keys and values, last `attention_layers` layers."""
    routing_feature_weight: float = 0.0
    """Weight of the direction of a mixture of teacher layers that the student's state chooses."""
    contrastive_weight: float = 0.0
    """Weight of telling a position's teacher state from those of other positions."""
    feature_layers: int = 4
    """Student layers, evenly spread and the last among them, that layerwise and routing_feature compare."""
    attention_layers: int = 4
    """Last layers whose attention is compared."""
    use_curriculum: bool = False
    """Bring the parts in one after another: distillation and next token at once, features at 0.3 of the plan, all at 0.6."""
    balance: str = "off"
    """`off`: weights as given. `auto`: weights follow the parts so that each keeps its share of the loss (kd .47, layerwise
    .27, lm .20, attention_alignment .04, routing_feature .01, attention .007, contrastive .007). Or shares of your own,
    `kd=0.5,lm=0.5`."""
    share_steps: int = 100
    """Optimizer steps between measurements of what each part's gradient is; 0: never."""
    non_finite_steps: int = 20
    """Steps in a row with a loss or gradient that is no number, after which the run stops. Each is skipped and told."""
    use_ema: bool = False
    """Keep a running average of the student's weights, score both at every evaluation and keep the better."""
    ema_decay: float = 0.9999
    """Decay of that average for each optimizer step, at most; in the beginning it is `(1 + n) / (10 + n)`."""
    label_smoothing: float = 0.0
    """Share of the label's probability spread over the vocabulary in the training loss (never in a perplexity)."""
    loss_chunk_size: int | str = "auto"
    """Rows of the output head decoded at once; `auto`: by the memory that is free. The result stays the same."""
    teacher_device: str = "auto"
    """Where the teacher runs: `cpu`, `cuda:1`, ...; elsewhere than the student it works one batch ahead. `auto`: on the
    second card where there are two and one process, else where the student is."""
    amp_dtype: str = "auto"
    """Arithmetic of the forward passes: `bf16` where the card really has it, else `fp16` on a card, `fp32` on a CPU."""
    gradient_checkpointing: str = "auto"
    """`on`: the student's layers keep only what they are given and are made anew in the backward pass: the same result from
    less memory, at about a third more time. `auto`: where a step would not fit in the memory otherwise."""
    optimizer: str = "adamw"
    """`adamw`, or `adamw_8bit`: the same with moments of 8 bits (2 bytes a weight instead of 8), by bitsandbytes."""
    teacher_quantization: str = "none"
    """Weights of the teacher's layers as `8bit` or `4bit` numbers, by bitsandbytes; `none`: as its dtype has them."""
    eval_steps: int = 0
    """Optimizer steps between evaluations; 0: a twentieth of the plan."""
    eval_tokens: int = 50_000
    """Student tokens of held-out text in one evaluation, at most; the test part, scored seldom, may have four times it."""
    log_steps: int = 1
    """Optimizer steps between two `train` records."""
    early_stopping_patience: int = 0
    """Evaluations without a better score after which a run ends; 0: never."""
    save_steps: int = 0
    """Optimizer steps between checkpoints: never more than these are lost. 0: by the clock, written behind the training,
    every two minutes or as seldom as keeps saving below 2 % of the time."""
    keep_checkpoints: int = 2
    """Checkpoints kept, the newest ones; each holds the best weights so far too."""
    second_copy: str = ""
    """Private Kaggle data set (`kaggle:OWNER/NAME`) or Hugging Face repository (`hub:OWNER/NAME`) for checkpoints."""
    second_copy_saves: int = 5
    """Checkpoints from one that is sent to the next."""
    time_budget: float | str = ""
    """Length of a session, counted from its start: hours, or `11h`, `40m`, `1h30m`, `90s`. Before it is over the run saves
    itself and ends `paused`; the same command goes on with it. Empty: no end."""
    control: str = "short"
    """The cross-entropy-only control: `full` (the whole wall-clock of the distilled run), `short` (a tenth of it, both
    compared there), `off` (the verdict then can't tell)."""
    repeats: int = 1
    """Independent pairs (distilled, control), at seeds `seed`, `seed + 1`, ...; from 2 on the interval covers seeds."""
    check_teacher: bool = True
    """Refuse a teacher that reads the text worse than its tokens' bare frequencies: the sign of a foreign tokenizer."""
    seed: int = 0
    """Seeds data order, dropout and new weights."""

    def __post_init__(self):
        for field in dataclasses.fields(self):
            object.__setattr__(self, field.name, _checked(field, getattr(self, field.name)))
        for name, choices in _CHOICES.items():
            value = getattr(self, name)
            if value not in choices:
                raise ValueError(f"unknown {name} {value!r}; have {', '.join(choices)}{nearest(value, choices)}")
        for name, (low, high) in _RANGES.items():
            value = getattr(self, name)
            if value != "auto" and not low <= value <= high:
                raise ValueError(f"{name} is {value}; it must lie between {low} and {high}")
        for name, (pattern, known) in _PATTERNS.items():
            if not re.fullmatch(pattern, getattr(self, name)):
                raise ValueError(f"unknown {name} {getattr(self, name)!r}; have {known}")
        if not self.lm_weight + sum(getattr(self, f"{name}_weight") for name in self._teaching()) > 0:
            raise ValueError("the weights of all parts are 0; nothing would be learned")
        if self.kd_top_k and self.kd_method == "chunk_likelihood":
            raise ValueError(
                "kd_top_k cuts distributions; kd_method chunk_likelihood compares none. Set one of the two"
            )
        self.target_shares()

    def _teaching(self):
        return [name for name in ("kd", *FEATURES) if name != "kd" or self.kd_method != "none"]

    @property
    def needs_teacher(self):
        """Whether any part learns from the teacher."""
        return self.kd_method != "none" or any(getattr(self, f"{name}_weight") > 0 for name in self._teaching())

    @property
    def cached(self):
        """Whether what the teacher says is to be taken from folders."""
        return self.teacher_cache not in ("auto", "live")

    def plain(self):
        """This run without its teacher: next-token cross-entropy and nothing else. What the control trains on."""
        off = {f"{name}_weight": 0.0 for name in FEATURES}
        return self.replace(kd_method="none", kd_top_k=0, lm_weight=1.0, use_curriculum=False, balance="off", **off)

    @property
    def effective_batch(self):
        """Windows of one process in one optimizer step."""
        return self.batch_size * self.grad_accumulation

    def target_shares(self):
        """Shares of the loss that `balance` asks for, `{part: share}`; None where it is off."""
        if self.balance in ("off", "auto"):
            return dict(SHARES) if self.balance == "auto" else None
        shares = {}
        for piece in self.balance.split(","):
            name, _, share = (word.strip() for word in piece.partition("="))
            try:
                shares[name] = float(share)
            except ValueError:
                raise ValueError(
                    f"balance {self.balance!r}: expected off, auto, or shares like kd=0.5,lm=0.5"
                ) from None
            if name not in SHARES:
                raise ValueError(f"balance names {name!r}{nearest(name, SHARES) or '; have ' + ', '.join(SHARES)}")
            if not 0 < shares[name] < 10**6:
                raise ValueError(f"balance gives {name} the share {share}; a share is above 0")
        return shares

    def require_inputs(self):
        """Raise ValueError unless teacher, student and dataset are named."""
        for name in ("teacher", "student", "dataset"):
            if not getattr(self, name) and not (name == "teacher" and self.cached):
                raise ValueError(f"{name} is missing; give --{name} (a Hugging Face id or a local path)")

    def replace(self, **changes):
        """A copy with some values changed, checked again."""
        return Config.from_dict({**self.to_dict(), **changes})

    def to_dict(self):
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values):
        """Build from a mapping; names may use hyphens, `preset` stands for those values of one of PRESETS not in it."""
        known = [field.name for field in dataclasses.fields(cls)]
        values = {str(key).replace("-", "_"): value for key, value in values.items()}
        if "preset" in values:
            preset = values.pop("preset")
            if preset not in PRESETS:
                raise ValueError(f"unknown preset {preset!r}; have {', '.join(PRESETS)}{nearest(preset, PRESETS)}")
            values = {**PRESETS[preset], **values}
        if unknown := next((name for name in values if name not in known), ""):
            raise ValueError(f"unknown key {unknown!r}{nearest(unknown, known) or '; have ' + ', '.join(known)}")
        return cls(**values)

    @classmethod
    def from_json(cls, path):
        """Read a file that holds one JSON object of config keys."""
        try:
            values = json.loads(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise ValueError(f"cannot read the config {path}: {error.strerror or error}") from None
        except ValueError as error:
            raise ValueError(f"{path} is not JSON: {error}") from None
        if not isinstance(values, dict):
            raise ValueError(f"{path} holds a {type(values).__name__}; expected one object of config keys")
        return cls.from_dict(values)


_CHOICES = {
    "kd_method": KD_METHODS, "kd_divergence": DIVERGENCES, "control": CONTROLS, "amp_dtype": AMP_DTYPES, "packing": PACKINGS,
    "gradient_checkpointing": ("auto", "on", "off"), "optimizer": ("adamw", "adamw_8bit"),
    "teacher_quantization": ("none", "8bit", "4bit"),
}  # fmt: skip

AUTO, DURATION = int | str, float | str
_HUGE = 10**12
_COPIES = r"|kaggle:[\w-]+/(?!-)[a-z0-9-]{6,50}(?<!-)|hub:[\w.-]+/[\w.-]+"
_PATTERNS = {
    "teacher_cache": (r".+", "auto, live, or the folders of a teacher cache"),
    "teacher_device": (r"auto|cpu|cuda(:\d+)?", "auto, cpu, cuda:0, cuda:1, ..."),
    "second_copy": (_COPIES, "kaggle:OWNER/NAME (NAME: 6-50 of a-z 0-9 -) or hub:OWNER/NAME"),
}  # fmt: skip
_RANGES = {
    "max_length": (4, 10**6), "batch_size": (1, 10**6), "grad_accumulation": (1, 10**6), "epochs": (1e-6, 10**6),
    "max_steps": (0, _HUGE), "learning_rate": (0.0, 10.0), "projector_learning_rate": (0.0, 10.0),
    "weight_decay": (0.0, 10.0), "max_grad_norm": (1e-9, _HUGE), "warmup": (0.0, 1.0),
    "kd_temperature": (0.05, 100.0), "kd_weight": (0.0, 10.0**6), "lm_weight": (0.0, 10.0**6),
    "label_smoothing": (0.0, 0.99), "loss_chunk_size": (1, 10**9), "kd_top_k": (0, 10**9),
    **{f"{name}_weight": (0.0, 10.0**6) for name in FEATURES}, "feature_layers": (1, 10**4), "attention_layers": (1, 10**4),
    "share_steps": (0, _HUGE), "non_finite_steps": (1, _HUGE),
    "eval_steps": (0, _HUGE), "save_steps": (0, _HUGE), "second_copy_saves": (1, _HUGE),
    "keep_checkpoints": (1, 10**6), "ema_decay": (0.0, 1.0),
    "eval_tokens": (16, _HUGE), "log_steps": (1, _HUGE), "early_stopping_patience": (0, _HUGE), "repeats": (1, 1000),
    "seed": (0, 2**31 - 1),
}  # fmt: skip


def flags():
    """`(name, field)` of every config key, in order: what the command line offers."""
    return [(field.name, field) for field in dataclasses.fields(Config)]


def parse_flag(name, text):
    """The value that `--name text` means, by the field's type; ValueError where it has no such meaning."""
    if name == "preset":
        return text
    field = {f.name: f for f in dataclasses.fields(Config)}[name]
    if field.type == AUTO:
        return text if text == "auto" else int(text) if text.lstrip("-").isdigit() else _checked(field, text)
    if field.type == DURATION:
        return text
    if field.type is bool:
        words = dict.fromkeys(("true", "1", "yes", "on"), True) | dict.fromkeys(("false", "0", "no", "off"), False)
        if text.lower() not in words:
            raise ValueError(f"{name} takes true or false, got {text!r}")
        return words[text.lower()]
    if field.type in (int, float):
        try:
            number = float(text)
        except ValueError:
            raise ValueError(f"{name} takes {_noun(field.type)}, got {text!r}") from None
        return int(number) if field.type is int and number.is_integer() else number
    return text


def _checked(field, value):
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
        raise ValueError(f"{field.name} takes {_noun(kind)}, got {value!r}")
    return value


def _noun(kind):
    named = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}
    return named.get(kind, "a duration")


def nearest(name, choices, mark=""):
    """`; did you mean 'kd_top_k'?` where one of `choices` looks like `name`, else nothing."""
    close = difflib.get_close_matches(str(name), list(choices), n=1, cutoff=0.6)
    return f"; did you mean {mark + close[0]!r}?" if close else ""
