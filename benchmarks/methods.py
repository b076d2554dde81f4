"""Every way to train a student that the quality study compares, each with the cells of its grid."""

import dataclasses

from benchmarks import variants
from benchmarks.rivals.plug import RIVALS, RivalObjective, WholeTeacher
from kdlib.models import hooks
from kdlib.session import inputs

PLAIN, EQUAL_STEPS, UNIT, DEFAULT = "CE only", "CE only, equal steps", "first_token", "byte_prefix"
"""Two controls, the method whose steps are the unit of time, and kdlib's default."""
CACHED, AVERAGED = "byte_prefix from a cache", "CE only, averaged weights"
AVERAGED_CACHED, PART_CACHED = "from a cache, averaged weights", "+ contrastive, from a cache"
CORE = (PLAIN, AVERAGED, EQUAL_STEPS, UNIT, DEFAULT, CACHED, AVERAGED_CACHED, "+ contrastive", PART_CACHED)
"""What is measured on every setting first."""
PLAIN_RATES = (5e-4, 1e-3, 2e-3, 4e-3, 6e-3, 1e-2, 1.6e-2, 2.5e-2)
"""Plain training has no weight to choose; it is tried with the middle five, as many as any other method has cells."""
RATES, WEIGHTS = (2.5e-3, 5e-3, 1e-2, 1.6e-2, 2.5e-2), (0.03, 0.1, 0.3, 0.6, 0.9)
"""Learning rates and kd weights that a method with a teacher may be tried with."""
FIRST = ((5e-3, 0.6), (1e-2, 0.3), (1e-2, 0.6), (1e-2, 0.9), (1.6e-2, 0.6))
"""Those that every one is."""


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


@dataclasses.dataclass(frozen=True)
class Method:
    """A row of the table: `changes` to the config of its setting. `more` (changes too) are the cells of its grid, where it
    is not the one of all; with `base` each goes on top of that method's chosen cell.
    """

    group: str
    changes: dict = dataclasses.field(default_factory=dict)
    base: str | None = None
    more: tuple = ()
    make: object = ours
    by_index: bool = False

    def cells(self):
        """The config changes of the cells that are tried in any case."""
        if self.base or self.more:
            return list(self.more or ({},))
        if self.group == "control":
            return [{"learning_rate": rate} for rate in PLAIN_RATES[2:-1]]
        return [{"learning_rate": rate, **kd(weight)} for rate, weight in FIRST]

    def beside(self, cell):
        """The cells next to one in the grid of all, which must have been tried before it is chosen."""
        if self.base or self.more:
            return []
        rate = cell["learning_rate"]
        if self.group == "control":
            return [{"learning_rate": other} for other in _next_to(PLAIN_RATES, rate)]
        weight = cell["kd_weight"]
        others = [(other, weight) for other in _next_to(RATES, rate)]
        others += [(rate, other) for other in _next_to(WEIGHTS, weight)]
        return [{"learning_rate": rate, **kd(weight)} for rate, weight in others]


def _next_to(values, value):
    place = values.index(value)
    return values[max(0, place - 1) : place] + values[place + 1 : place + 2]


def tried(make=ours, *more, **changes):
    """The default's chosen cell with something changed."""
    return Method("search", {"kd_method": DEFAULT, **changes}, DEFAULT, more, make)


def changed(base, make, *more, **changes):
    """The same for another method than the default."""
    return Method("search", changes, base, more, make)


def with_part(name, *weights):
    """The default with one part beside it, at several weights."""
    return Method("parts", {"kd_method": DEFAULT}, DEFAULT, tuple({f"{name}_weight": weight} for weight in weights))


CONTROL = {"kd_method": "none", "lm_weight": 1.0}
METHODS = {
    PLAIN: Method("control", CONTROL),
    EQUAL_STEPS: Method("control", CONTROL),
    DEFAULT: Method("ours", {"kd_method": DEFAULT}),
    CACHED: Method("ours", {"kd_method": DEFAULT}, make=variants.from_cache),
    UNIT: Method("ours", {"kd_method": UNIT}),
    "first_token from a cache": Method("ours", {"kd_method": UNIT}, make=variants.from_cache),
    "shared_vocab": Method("ours", {"kd_method": "shared_vocab"}),
    "projector": Method("ours", {"kd_method": "projector"}),
    "chunk_likelihood": Method("ours", {"kd_method": "chunk_likelihood"}),
    "first_token + chunk_likelihood": Method("mixed", {"kd_method": UNIT}, make=variants.with_chunks),
    "first_token + projector": Method("mixed", {"kd_method": UNIT}, make=variants.with_projector),
    "ULD": Method("rivals", {}, make=rival(RIVALS["ULD"])),
    "GOLD hybrid": Method("rivals", {}, make=rival(RIVALS["GOLD hybrid"])),
    "DSKD-CMA": Method("rivals", {"kd_temperature": 2.0}, make=rival(RIVALS["DSKD-CMA"])),
    "MinED": Method("rivals", {}, make=rival(RIVALS["MinED"])),
    "index pairs": Method("rivals", {"kd_method": UNIT}, by_index=True),
    "+ contrastive": with_part("contrastive", 0.05, 0.15),
    "+ layerwise": with_part("layerwise", 0.1, 0.3),
    "+ routing_feature": with_part("routing_feature", 0.1, 0.3),
    "+ attention": with_part("attention", 0.03, 0.1),
    "+ attention_alignment": with_part("attention_alignment", 0.01, 0.04),
    "preset documents": Method(
        "parts", {"preset": "documents", "kd_method": DEFAULT}, None,
        tuple({"learning_rate": rate, "kd_temperature": t} for rate in (5e-3, 1e-2) for t in (1.0, 4.0)),
    ),
    "averaged weights": tried(use_ema=True),
    AVERAGED: Method("control", {**CONTROL, "use_ema": True}, PLAIN),
    "unsure student": tried(variants.weighted_by(variants.unsure_student)),
    "right teacher": tried(variants.weighted_by(variants.right_teacher)),
    "sure teacher": tried(variants.weighted_by(variants.sure_teacher)),
    "jsd": tried(kd_divergence="jsd"),
    "reverse_kl": tried(kd_divergence="reverse_kl"),
    "skew_forward_kl": tried(kd_divergence="skew_forward_kl"),
    "temperature": tried(ours, {"kd_temperature": 0.8}, {"kd_temperature": 1.5}),
    "documents, all at once": changed("preset documents", ours, preset="documents", kd_method=DEFAULT, use_curriculum=False),
    "+ layerwise, over spans": changed("+ layerwise", variants.span_averages, kd_method=DEFAULT),
    AVERAGED_CACHED: changed(CACHED, variants.from_cache, kd_method=DEFAULT, use_ema=True),
    PART_CACHED: changed(
        CACHED, variants.from_cache, {"contrastive_weight": 0.05}, {"contrastive_weight": 0.15}, kd_method=DEFAULT
    ),
    "from a cache of 16": changed(CACHED, variants.from_cache, kd_method=DEFAULT, kd_top_k=16),
    "from a cache of 256": changed(CACHED, variants.from_cache, kd_method=DEFAULT, kd_top_k=256),
    "first_token, half shared": changed(UNIT, variants.half_shared, kd_method=UNIT),
    "projector, its own rate": changed(
        "projector", ours, *({"projector_learning_rate": rate} for rate in (0.0, 1e-3, 2e-2)), kd_method="projector",
    ),
    "projector of rank 16": changed("projector", variants.low_rank(16), kd_method="projector"),
}  # fmt: skip
