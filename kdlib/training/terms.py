"""Loss terms. The docstring of each states its formula, cost, suggested weight and measured benefit."""

import dataclasses

import numpy as np
import torch

from kdlib.losses import divergences, features

CONTRASTIVE_TEMPERATURE = 0.1


@dataclasses.dataclass(frozen=True)
class LogitsBlock:
    """Input of the terms on logits: n rows, the first m of which are aligned, that is have a teacher signal.

    `logits` `[n, Vs]`. `labels` `[n]`: columns of the logits, or IGNORE. `teacher_logits` `[m, U]`: in the teacher's
    own vocabulary, or projected into the student's. `span_of` `[n]`: the aligned row that starts a row's span, -1 for
    none. `teacher_span_log_probs` `[m]`. `topk`: a cached teacher's `TopKLogProbs` of the m rows. `partial_tokens`: the
    block's `PartialTokenBlock`. `buckets_agree` `[m]`: whether the text's own next tokens lie in one bucket. `metrics`
    collects values to record, averaged as METRIC_NORMALISERS says. `cache` holds log-probabilities by temperature.
    """

    logits: torch.Tensor
    labels: torch.Tensor
    num_aligned: int
    teacher_logits: torch.Tensor | None
    span_of: torch.Tensor
    teacher_span_log_probs: torch.Tensor | None
    topk: object | None = None
    partial_tokens: object | None = None
    buckets_agree: torch.Tensor | None = None
    metrics: dict = dataclasses.field(default_factory=dict)
    cache: dict = dataclasses.field(default_factory=dict)

    def log_probs(self, temperature=1.0):
        """Returns the student's log-probabilities of all n rows, computed once per temperature."""
        if temperature not in self.cache:
            self.cache[temperature] = divergences.log_softmax(self.logits, temperature)
        return self.cache[temperature]


@dataclasses.dataclass(frozen=True)
class FeatureBatch:
    """Input of the terms on features: a micro-batch at its N aligned positions.

    `student`: `forward.Features`. `teacher`: `TeacherSignal`. `state` `[N, Ds]`: the student's last hidden states.
    `rows_by_window`: how many of the N positions lie in each window.
    """

    student: object
    teacher: object
    state: torch.Tensor
    rows_by_window: tuple
    metrics: dict = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class LossTerm:
    """One summand of the loss. `fn(objective, input)` returns one value per position, in nats.

    `normaliser`: the positions to average over, `labels`, `aligned` or `spans`. `reads`: `logits` for a `LogitsBlock`,
    or `state`, `layers` or `attention_input` of a `FeatureBatch`, where the term's gradient is measured. `starts_at`:
    fraction of the plan at which the curriculum starts it. A term with `trains_student=False` trains only its own
    weights, at weight 1, and is not part of the student's total.
    """

    fn: object
    normaliser: str
    reads: str = "logits"
    starts_at: float = 0.0
    trains_student: bool = True


def next_token(objective, block):
    """lm: next-token cross-entropy on the text itself, `-log p(label)`, smoothed by `label_smoothing` (Szegedy et al.
    2015, arXiv 1512.00567). Always on: the only term that reads the labels, and all that the control trains on. Cost:
    one pass over logits that exist anyway. Start: 0.4 with kd 0.6 (RESULTS.md).
    """
    return divergences.cross_entropy(block.log_probs(), block.labels, objective.config.label_smoothing)


def shared_tokens(objective, block):
    """kd by `first_token` or `shared_vocab`: `T^2 D(teacher || student)` over buckets of tokens that both
    vocabularies contain (`vocab.Buckets`).

    Both sides use the full softmax. At T = 1 the value is therefore a lower bound of the divergence over all next
    tokens (data-processing inequality; Cover and Thomas 2006, section 2.8). T softens buckets, not tokens: otherwise a
    bucket of many tokens would grow with T (LOG.md has the cost).

    Models that are certain of the text, each in its own tokens, must agree. So a position has no signal if the text's
    next tokens lie in different buckets, and `first_token` joins buckets that often conflict (`trie.buckets_of`). A
    loss that ignores this teaches the student the teacher's segmentation, above all of line breaks and indentation
    (byte-prefix marginalization, arXiv 2607.22334, reports it on code). What remains: the teacher's segmentation
    reveals a little of the text that follows.

    Helps if the vocabularies share much (84 % for GPT-2 and Qwen); `first_token` also uses the rest. Cost: the
    teacher's own head, `N Vt Dt` multiplications, the most expensive method; no permanent memory. Start: 0.6 for
    `first_token`; 0.1 for `shared_vocab`, which gained 0.03 bits per byte over plain training in the same time on one
    of three pairs, and nothing on the others (RESULTS.md). `kd_top_k` keeps the union of both models' top-k buckets
    plus a tail; with a teacher cache, the teacher's top k.
    """
    if block.topk is not None:
        student = _bucket_log_probs(objective, block.log_probs()[: block.num_aligned], objective.student_buckets)
        return torch.where(block.buckets_agree, _divergence_from_top_k(objective, block, student), 0.0)
    return _bucket_divergence(objective, block, divergences.log_softmax(block.teacher_logits))


def byte_prefix(objective, block):
    """kd by `byte_prefix`: `first_token` at common boundaries, and a signal at every position inside a token of the
    other side.

    Where the student has read part of a teacher token, the teacher's distribution at that token's beginning is
    restricted to tokens that start with this part. This gives the distribution of the student's next token; a teacher
    inside a student token is treated likewise (`trie.Trie`; Phan et al. 2024, arXiv 2410.09303, compute next-byte
    probabilities so). By the chain rule, the value of a common boundary is the sum up to the next one; the loss is the
    mean of these sums.

    The default: on three pairs with pretrained students 0.03 to 0.09 bits per byte better than `first_token` in the
    same time (0.00 to 0.08 from a teacher cache), and better than any rival (RESULTS.md). Helps most if the tokens of
    the two differ much. Cost: that of `first_token`, plus the teacher's head at its positions inside student tokens:
    1.06 to 1.13 of its step time. As there, outcomes are joined buckets, and positions where the text's own tokens
    differ in outcome have no signal. Not exact if the teacher could also have read a shorter token: its distribution
    after that is unknown. Start: 0.6 with lm 0.4 (RESULTS.md). T softens the outcomes of a position; `kd_top_k`
    truncates the buckets. Only tokens of whole characters are used, in learned text that no normaliser changed. A
    teacher cache holds each position's most likely outcomes and a tail. Metric: `kd_positions`, the share of learned
    positions with a signal.
    """
    partial, student = block.partial_tokens, block.log_probs()
    if block.topk is not None:
        values = shared_tokens(objective, block)
        partial_values = _partial_divergences_from_cache(objective, student, partial)
    else:
        teacher = divergences.log_softmax(block.teacher_logits)
        values = _bucket_divergence(objective, block, teacher)
        partial_values = _partial_divergences(objective, student, teacher, partial)
    with_signal = block.buckets_agree.to(values.dtype), values.new_ones(len(partial.student_rows))
    block.metrics["kd_positions"] = torch.cat(with_signal)
    for addend, span_of in zip(partial_values, (partial.span_of, partial.inner_span_of), strict=True):
        values = values.index_add(0, torch.from_numpy(span_of).to(values.device), addend)
    return values


def projected(objective, block):
    """kd by `projector`: the teacher's last hidden state through a learned matrix and the student's own live head, then
    `T^2 D(teacher || student)` over the full student vocabulary (DSKD, Zhang et al. 2024, arXiv 2406.17328, section
    3.1).

    Cost: the only method that never needs the teacher's head (`N Vs Ds` multiplications instead of `N Vt Dt`). Start:
    0.3 with lm 0.7; on two of three pairs it was 0.05 bits per byte better than plain training in the same time
    (RESULTS.md). The target is only as good as the projector. It is detached: the projector learns from its own
    cross-entropy.
    """
    temperature = objective.config.kd_temperature
    teacher = divergences.log_softmax(block.teacher_logits.detach(), temperature)
    return _divergence(objective, block, block.log_probs(temperature)[: block.num_aligned], teacher)


def projector_cross_entropy(objective, block):
    """projector: next-token cross-entropy of the projected teacher. It trains the projector only and has no weight."""
    return divergences.cross_entropy(divergences.log_softmax(block.teacher_logits), block.labels[: block.num_aligned])


def chunk_likelihood(objective, block):
    """kd by `chunk_likelihood`: divergence of the two models' likelihoods of a span that both tokenizations delimit, as
    Bernoulli distributions of this text or any other (ALM, Minixhofer et al. 2025, arXiv 2503.20083, section 3).

    It needs no common tokens, only a common text, so it fits pairs that share few tokens. It learns from one number per
    span instead of a distribution. `kd_temperature` softens the likelihoods (`p^(1/T)`); `kd_top_k` has no effect.
    Cost: one pass of the teacher's head. Start: 0.3, which gained 0.013 bits per byte over plain training on one of
    three pairs, and nothing on the others (RESULTS.md).
    """
    config = objective.config
    nats = divergences.cross_entropy(block.log_probs(), block.labels)
    student = divergences.span_log_probs(nats, block.span_of, block.num_aligned)
    num, span_of = block.num_aligned, torch.where(block.span_of < 0, block.num_aligned, block.span_of)
    starts_span = torch.zeros(num + 1, dtype=torch.bool, device=student.device).index_fill(0, span_of, True)[:num]
    teacher = block.teacher_span_log_probs.to(student.dtype)
    values = divergences.span_divergence(student, teacher, config.kd_divergence, config.kd_temperature)
    return torch.where(starts_span, values, 0.0)


def layerwise(objective, batch):
    """layerwise: `1 - cos` between the student's layer outputs, through a learned matrix, and those of the teacher
    layer at the same relative depth; mean over `feature_layers` layers (FitNets, arXiv 1412.6550; PKD, arXiv
    1908.09355).

    Both sides are standardised per dimension with statistics measured before training, so that the few outlier
    dimensions of a residual stream do not dominate. About 1 at the start, never above 2. Cost: `N Ds Dt`
    multiplications and two `[N, Dt]` matrices per layer. Start: 0.3; on three pairs 0.000 to 0.011 bits per byte worse
    than the default without it in the same time (RESULTS.md). Largely redundant with routing_feature.
    """
    pairs = zip(objective.adapters["layerwise"], batch.student.layers, batch.teacher.layers, strict=True)
    return torch.stack([divergences.one_minus_cosine(*adapter(a, b)) for adapter, a, b in pairs]).mean(dim=0)


def attention_maps(objective, batch):
    """attention: KL from the teacher's attention map to the student's over spans that both tokenizations delimit
    (`features.span_map`), mean over the last `attention_layers` layers (MiniLM, Wang et al. 2020, arXiv 2002.10957, eq.
    3).

    For tasks that depend on *where the model attends*. Cost: queries and keys of those layers only, `H K S` floats per
    layer while it runs. Start: 0.03; on three pairs 0.012 to 0.031 bits per byte worse than the default without it in
    the same time (RESULTS.md). 0.007 in the preset. Rows are aligned, learned positions; a conversation's prompt is not
    used.
    """
    values = [
        torch.cat([divergences.forward_kl(a, b) for a, b in zip(student, teacher, strict=True)])
        for student, teacher in zip(batch.student.maps, batch.teacher.maps, strict=True)
    ]
    return torch.stack(values).mean(dim=0)


def attention_alignment(objective, batch):
    """attention_alignment: KL between self-relations of queries, keys and values over positions, mean over these and
    the last `attention_layers` layers (MiniLMv2, Wang et al. 2021, arXiv 2012.15828).

    Both sides may have any number of heads, grouped or not: vectors are split into common relation heads. Needs no
    learned map between models of any shape. Cost: `3 K^2 W` multiplications per window and layer. Start: 0.01; on three
    pairs 0.064 to 0.076 bits per byte worse than the default without it in the same time (RESULTS.md): its steps cost
    1.8 of the default's at the study's small shapes. Relations are causal.
    """
    values = [
        torch.stack([_relation_kl(a, b, batch.rows_by_window) for a, b in zip(*vectors, strict=True)]).mean(dim=0)
        for vectors in zip(batch.student.vectors, batch.teacher.vectors, strict=True)
    ]
    return torch.stack(values).mean(dim=0)


def routing_feature(objective, batch):
    """routing_feature: `1 - cos` between the student's last state, through a learned matrix, and a mixture of the
    tapped teacher layers that the student's state selects (`projector.LayerRouter`; choosing by the student's state
    follows Jang et al. 2019, arXiv 1905.05901). Metrics: the mixture weights `routing_0`, `routing_1`, ...

    For pairs without a good fixed layer mapping. Cost: one map and K standardised `[N, Dt]` matrices. Start: 0.3; on
    one of three pairs 0.017 bits per byte worse than the default without it in the same time, no significant difference
    on the others (RESULTS.md). 0.01 in the preset.
    """
    mapped, target, weights = objective.adapters["routing_feature"](batch.state, batch.teacher.layers)
    for layer, weight in enumerate(weights.detach().unbind(dim=1)):
        batch.metrics[f"routing_{layer}"] = weight
    return divergences.one_minus_cosine(mapped, target)


def contrastive(objective, batch):
    """contrastive: InfoNCE between the student's last state, through a learned matrix, and the teacher's at the same
    position; the other spans of the same window are the negatives (CRD, Tian et al. 2020, arXiv 1910.10699; InfoNCE,
    arXiv 1807.03748). Negatives stay within the window so that the number of micro-batches has no effect.

    Discriminates positions instead of matching directions; about ln K for K spans at the start. Cost: `K^2 Dt` per
    window. Start: 0.15 with a student from scratch, which gained 0.02 to 0.03 bits per byte over the default without it
    in the same time, from a teacher cache; with a pretrained student nothing, or 0.01 worse (RESULTS.md). 0.007 in the
    preset.
    """
    mapped, target = objective.adapters["contrastive"](batch.state, batch.teacher.hidden)
    windows = zip(mapped.split(batch.rows_by_window), target.split(batch.rows_by_window), strict=True)
    return torch.cat([divergences.info_nce(a, b, CONTRASTIVE_TEMPERATURE) for a, b in windows])


def _bucket_divergence(objective, block, teacher):
    """Returns `T^2 D` over buckets, `[m]`, from the teacher's token log-probabilities `[m, Vt]`."""
    student = _bucket_log_probs(objective, block.log_probs()[: block.num_aligned], objective.student_buckets)
    values = _divergence(objective, block, student, _bucket_log_probs(objective, teacher, objective.teacher_buckets))
    return torch.where(block.buckets_agree, values, 0.0)


def _partial_divergences(objective, student, teacher, partial):
    """Returns the divergences at the student's and at the teacher's positions inside tokens of the other side."""
    settings = objective.config.kd_divergence, objective.config.kd_temperature
    inner = divergences.log_softmax(partial.inner_logits)
    inner = divergences.bucket_log_probs(inner, objective.teacher_buckets, objective.buckets.num)
    sides = (
        ((teacher, partial.span_of), _partial_buckets(objective, student, partial), partial.nodes),
        ((student, partial.inner_span_of), (inner, np.arange(len(inner))), partial.inner_nodes),
    )
    return [trie.divergence(*side, *settings) for trie, side in zip(objective.tries, sides, strict=True)]


def _partial_buckets(objective, log_probs, partial):
    """Returns the student's bucket log-probabilities at its positions inside teacher tokens, and row numbers."""
    inner = log_probs[partial.student_rows]
    inner = divergences.bucket_log_probs(inner, objective.student_buckets, objective.buckets.num)
    return inner, np.arange(len(inner))


def _partial_divergences_from_cache(objective, student, partial):
    config, values = objective.config, []
    sides = (
        (partial.topk, *_partial_buckets(objective, student, partial), partial.nodes),
        (partial.inner_topk, student, partial.inner_span_of, partial.inner_nodes),
    )
    for trie, (topk, *side) in zip(objective.tries, sides, strict=True):
        topk = topk.truncate(config.kd_top_k) if config.kd_top_k else topk
        values.append(trie.divergence_from_shortlist(topk, *side, config.kd_divergence, config.kd_temperature))
    return values


def _bucket_log_probs(objective, log_probs, bucket_of):
    """Returns log-probabilities of buckets at the config's temperature."""
    buckets = divergences.bucket_log_probs(log_probs, bucket_of, objective.buckets.num)
    temperature = objective.config.kd_temperature
    return buckets if temperature == 1.0 else divergences.log_softmax(buckets, temperature)


def _divergence_from_top_k(objective, block, student):
    """Returns `T^2 D` over the cached teacher's top tokens and one tail, from the student's bucket log-probabilities."""
    config = objective.config
    topk = block.topk.truncate(config.kd_top_k) if config.kd_top_k else block.topk
    kept = objective.student_buckets[objective.head.columns(topk.ids)]
    block.metrics["kd_covered"] = 1.0 - topk.log_probs[:, -1].exp()
    student = divergences.gather_with_tail(student, kept)
    return divergences.tempered_divergence(student, topk.log_probs, config.kd_divergence, config.kd_temperature)


def _divergence(objective, block, student, teacher):
    """Returns `T^2 D` of log-probabilities at temperature T, truncated to `kd_top_k` and a tail if configured."""
    config = objective.config
    if config.kd_top_k:
        student, teacher, block.metrics["kd_covered"] = divergences.top_k_with_tail(student, teacher, config.kd_top_k)
    return divergences.tempered_divergence(student, teacher, config.kd_divergence, config.kd_temperature)


def _relation_kl(student, teacher, rows_by_window):
    """Returns the KL of relations of one kind of vector `[N, W]` within windows, mean over relation heads, `[N]`."""
    heads = features.relation_heads(student.shape[1], teacher.shape[1], features.RELATION_HEADS)
    windows = zip(student.split(rows_by_window), teacher.split(rows_by_window), strict=True)
    relations = [(features.relations(a, heads), features.relations(b, heads)) for a, b in windows]
    return torch.cat([divergences.forward_kl(a, b).mean(dim=0) for a, b in relations])


METRIC_NORMALISERS = {"kd_covered": "aligned", "kd_positions": "labels"}
"""Metrics of terms on logits, and the positions that each is averaged over."""
LM = {"lm": LossTerm(next_token, "labels")}
KD = {
    "none": {},
    "shared_vocab": {"kd": LossTerm(shared_tokens, "aligned")},
    "first_token": {"kd": LossTerm(shared_tokens, "aligned")},
    "byte_prefix": {"kd": LossTerm(byte_prefix, "aligned")},
    "projector": {
        "kd": LossTerm(projected, "aligned"),
        "projector": LossTerm(projector_cross_entropy, "aligned", trains_student=False),
    },
    "chunk_likelihood": {"kd": LossTerm(chunk_likelihood, "spans")},
}
FEATURES = {
    "layerwise": LossTerm(layerwise, "aligned", reads="layers", starts_at=0.3),
    "attention": LossTerm(attention_maps, "aligned", reads="attention_input", starts_at=0.3),
    "attention_alignment": LossTerm(attention_alignment, "aligned", reads="attention_input", starts_at=0.3),
    "routing_feature": LossTerm(routing_feature, "aligned", reads="state", starts_at=0.3),
    "contrastive": LossTerm(contrastive, "aligned", reads="state", starts_at=0.6),
}


def active_terms(config):
    """Returns the `LossTerm`s of a config by name: those with a weight above 0, and those that train no student."""
    terms = {**LM, **KD[config.kd_method], **FEATURES}
    return {n: term for n, term in terms.items() if not term.trains_student or getattr(config, f"{n}_weight") > 0}
