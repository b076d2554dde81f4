"""Every way to train a student that the quality study compares, each with the cells of its grid."""

import dataclasses

from benchmarks import variants
from benchmarks.rivals.plug import RIVALS, RivalObjective, WholeTeacher
from benchmarks.spelled import Remembering, Spelled, SpelledContrastive
from kdlib import hooks, inputs

RATES = (5e-3, 1e-2)
"""Learning rates that every method is tried with."""
PLAIN_RATES = (2e-3, 4e-3, 6e-3, 1e-2)
"""Plain training has no weight to choose; it gets as many cells, all of them learning rates."""
PLAIN, EQUAL_STEPS, DEFAULT, INSIDE = "CE only", "CE only, equal steps", "shared_prefix", "inside tokens, both sides"


def kd(weight):
    return {"kd_weight": weight, "lm_weight": round(1.0 - weight, 3)}


def ours(setting, config, student):
    """`(objective, teacher)` as kdlib makes them."""
    pair = setting.inputs.pair
    return inputs.make_objective(pair, config, student), pair.teacher if config.needs_teacher else None


def rival(kind):
    """The same for a class as in RIVALS."""

    def make(setting, config, student):
        pair = setting.inputs.pair
        hooks.watch_attention(pair.teacher.model, False)
        return RivalObjective(kind, pair, student, config), WholeTeacher(pair.teacher)

    return make


def remembering(setting, config, student):
    """`inside tokens, both sides` with a teacher that reads each window once."""
    objective, _ = rival(Spelled)(setting, config, student)
    return objective, Remembering(setting.inputs.pair.teacher, setting.kept.setdefault("memory", {}))


@dataclasses.dataclass(frozen=True)
class Method:
    """A row of the table: `changes` to the config of its setting, `weights` (changes too) the second side of its grid, the
    first being learning rates. `base`: the method whose chosen cell it starts from, with `weights` on top and no other rate.
    """

    group: str
    changes: dict = dataclasses.field(default_factory=dict)
    weights: tuple = (kd(0.3), kd(0.6))
    base: str | None = None
    make: object = ours
    by_index: bool = False

    def cells(self):
        """The config changes of each cell."""
        if self.base:
            return list(self.weights)
        rates = PLAIN_RATES if self.group == "control" else RATES
        return [{"learning_rate": rate, **weights} for rate in rates for weights in self.weights]


def tried(make=ours, *cells, **changes):
    """The default's chosen cell with something changed."""
    return Method("search", {"kd_method": DEFAULT, **changes}, cells or ({},), DEFAULT, make)


def with_part(name, *weights):
    """The default with one part beside it, at several weights."""
    return Method("parts", {"kd_method": DEFAULT}, tuple({f"{name}_weight": weight} for weight in weights), DEFAULT)


CONTROL = {"kd_method": "none", "lm_weight": 1.0}
METHODS = {
    PLAIN: Method("control", CONTROL, ({},)),
    EQUAL_STEPS: Method("control", CONTROL, ({},)),
    DEFAULT: Method("ours", {"kd_method": "shared_prefix"}),
    "shared_vocab": Method("ours", {"kd_method": "shared_vocab"}),
    "inside_tokens": Method("ours", {"kd_method": "inside_tokens"}),
    "projector": Method("ours", {"kd_method": "projector"}),
    "chunk_likelihood": Method("ours", {"kd_method": "chunk_likelihood"}),
    "shared_prefix + chunk_likelihood": Method("mixed", {"kd_method": "shared_prefix"}, make=variants.with_chunks),
    "shared_prefix + projector": Method("mixed", {"kd_method": "shared_prefix"}, make=variants.with_projector),
    "from a cache of 64": Method("ours", {"kd_method": DEFAULT, "kd_top_k": 64}, make=variants.from_cache),
    "+ contrastive": with_part("contrastive", 0.05, 0.2),
    "+ layerwise": with_part("layerwise", 0.1, 0.3),
    "+ routing_feature": with_part("routing_feature", 0.1, 0.3),
    "+ attention": with_part("attention", 0.03, 0.1),
    "+ attention_alignment": with_part("attention_alignment", 0.01, 0.04),
    "preset documents": Method("parts", {"preset": "documents"}, ({}, {"kd_temperature": 1.0})),
    "ULD": Method("rivals", {}, make=rival(RIVALS["ULD"])),
    "GOLD hybrid": Method("rivals", {}, make=rival(RIVALS["GOLD hybrid"])),
    "DSKD-CMA": Method("rivals", {"kd_temperature": 2.0}, make=rival(RIVALS["DSKD-CMA"])),
    "MinED": Method("rivals", {}, make=rival(RIVALS["MinED"])),
    "index pairs": Method("rivals", {"kd_method": "shared_prefix"}, by_index=True),
    INSIDE: Method("mixed", make=rival(Spelled)),
    "inside, contrastive": Method(
        "search", {}, ({"contrastive_weight": 0.05}, {"contrastive_weight": 0.15}), INSIDE, rival(SpelledContrastive)
    ),
    "inside, read once": Method("mixed", {}, ({},), INSIDE, remembering),
    "inside tokens": tried(variants.with_inside),
    "averaged weights": tried(use_ema=True),
    "CE only, averaged weights": Method("search", {**CONTROL, "use_ema": True}, ({},), PLAIN),
    "unsure student": tried(variants.weighted_by(variants.unsure_student)),
    "right teacher": tried(variants.weighted_by(variants.right_teacher)),
    "sure teacher": tried(variants.weighted_by(variants.sure_teacher)),
    "jsd": tried(kd_divergence="jsd"),
    "reverse_kl": tried(kd_divergence="reverse_kl"),
    "skew_forward_kl": tried(kd_divergence="skew_forward_kl"),
    "temperature": tried(ours, {"kd_temperature": 0.8}, {"kd_temperature": 1.5}),
}  # fmt: skip
