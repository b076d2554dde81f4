"""The parts of the objective: what each is, costs and is good for stands in the docstring of its function; one row of the
plug board at the end says what it is fed with.
"""

import dataclasses

import numpy as np
import torch

from kdlib.losses import divergences, features

CONTRAST = 0.1
"""Temperature of the contrastive part's cosines."""


@dataclasses.dataclass(frozen=True)
class LogitsBlock:
    """One block of rows as the parts on logits see it: n rows, the first m of which have a teacher signal.

    `logits` `[n, Vs]`; `labels` `[n]`: columns of the logits, IGNORE where nothing is learned; `other` `[m, U]`: the logits
    they are compared with (the teacher's in its own vocabulary, or projected into the student's), if any; `span_of` `[n]`:
    which of the m rows starts the span a row belongs to, -1 for none; `spans` `[m]`: the teacher's log-likelihoods; `top`:
    the teacher's `TopKLogProbs` at the m rows, where these are all that is known. `inside`: the block's `trie.PartialTokenBlock`, if
    any. `agrees` `[m]`: whether the text's own next tokens lie in one bucket, where buckets are compared. `figures` collects
    values worth a record, which are counted as in COUNTED.
    """

    logits: torch.Tensor
    labels: torch.Tensor
    num_known: int
    other: torch.Tensor | None
    span_of: torch.Tensor
    spans: torch.Tensor | None
    top: object | None = None
    inside: object | None = None
    agrees: torch.Tensor | None = None
    figures: dict = dataclasses.field(default_factory=dict)
    made: dict = dataclasses.field(default_factory=dict)

    def log_probs(self, temperature=1.0):
        """Of all n rows; made once a temperature."""
        if temperature not in self.made:
            self.made[temperature] = divergences.log_softmax(self.logits, temperature)
        return self.made[temperature]


@dataclasses.dataclass(frozen=True)
class FeatureBatch:
    """One micro-batch as the parts on features see it: `student` (`loading.Features`) and `teacher` (`TeacherSignal`) at its
    N aligned positions, `state` `[N, Ds]` the student's last hidden states there, `by_window` how many lie in each window.
    """

    student: object
    teacher: object
    state: torch.Tensor
    by_window: tuple
    figures: dict = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class LossTerm:
    """A part: its values per position, the positions it counts (`labels`, `aligned` or `spans`), and what it reads: `LogitsBlock`
    of `logits`, or a `FeatureBatch` (then `on` says where it touches the student: `state`, `layers` or `below`, as in
    `loading.Features`). With the curriculum it begins at `phase`. Without `student` it trains only its own weights, at
    weight 1, and stays out of the student's total.
    """

    values: object
    counts: str
    on: str = "logits"
    phase: float = 0.0
    student: bool = True


def next_token(objective, rows):
    """lm: next-token cross-entropy on the text itself, `-log p(label)`, smoothed by `label_smoothing` (Szegedy et al. 2015,
    arXiv 1512.00567). Always on: it is the only part that knows the text, and the control trains on it alone. Cost: one
    pass over logits that are there anyway. Start: 0.4 beside kd 0.6 (RESULTS.md).
    """
    return divergences.cross_entropy(rows.log_probs(), rows.labels, objective.config.label_smoothing)


def shared_tokens(objective, rows):
    """kd by `shared_prefix` or `shared_vocab`: `T^2 D(teacher || student)` over buckets of tokens that both vocabularies
    can say (`vocab.Buckets`); whole softmax on both sides, so at T = 1 a lower bound of the divergence over all that either
    can say next (data-processing inequality; Cover and Thomas 2006, section 2.8). T softens the buckets and not the tokens:
    a bucket of many tokens would swell with T (LOG.md has what that costs).

    Where both models would be certain of the text, each in its own tokens, they have to agree: a position where the text's
    next tokens lie in different buckets has no signal, and with `shared_prefix` buckets that often part so are joined
    (`trie.buckets_of`). A loss that compares them all the same teaches the student the teacher's way to cut the
    text, above all line breaks and indentation (byte-prefix marginalization, arXiv 2607.22334, met it on code). Left is
    that a teacher's cut tells it a little of what comes next, where it would have cut otherwise had the text gone on
    otherwise.

    Helps where the vocabularies share much (84 % for GPT-2 and Qwen); `shared_prefix` also uses the rest. Cost: the
    teacher's own head, `N Vt Dt` multiplications, the dearest way; no memory that stays. Start: 0.6 for `shared_prefix`,
    0.1 for `shared_vocab`, which gained 0.03 bits per byte over plain training in the same time on one of three pairs, and
    nothing on the others (RESULTS.md). With `kd_top_k` the buckets are cut to the likeliest of either side and a tail; a
    teacher cache knows its own likeliest only, so there the cut is to the teacher's.
    """
    if rows.top is not None:
        ours = _in_buckets(objective, rows.log_probs()[: rows.num_known], objective.student_buckets)
        return torch.where(rows.agrees, _divergence_from_top(objective, rows, ours), 0.0)
    return _shared_tokens(objective, rows, divergences.log_softmax(rows.other))


def inside_tokens(objective, rows):
    """kd by `inside_tokens`: `shared_prefix` where both tokenizations meet, and a signal at every position of either side
    inside a token of the other. Where the student has read a part of a teacher's token, what the teacher said at that
    token's beginning, restricted to tokens that begin with this part, gives the distribution of the student's next token;
    where the teacher is inside a student's token, the other way round (`trie.Trie`). A common boundary counts what is
    said up to the next one, by the chain rule: the loss is a mean over common boundaries, of sums. Restricting a token
    distribution to what was read is also how Phan et al. 2024, arXiv 2410.09303, get next-byte probabilities.

    The default: on three pairs with students trained before 0.03 to 0.09 bits per byte better than `shared_prefix` in the
    same time (0.00 to 0.08 from a teacher cache), and better than any rival (RESULTS.md). Helps most where tokens of the
    two differ much. Cost: as `shared_prefix`, and the teacher's head once more at its own positions inside the student's
    tokens: 1.06 to 1.13 of its step. As there, outcomes are joined buckets, and a place where the text's own tokens are
    different outcomes has no signal. Not exact where the teacher could also have read a shorter token: what it would have
    said after that one is not known. Start: 0.6 beside lm 0.4 (RESULTS.md). T softens the outcomes at a position, as it
    softens buckets; `kd_top_k` cuts the buckets. Only tokens of whole characters, in text that is learned and that no
    normaliser changed; others give and take no signal. A teacher cache holds the likeliest outcomes of each position inside
    a token and a tail. Recorded: `kd_positions`, the share of the learned positions with a signal.
    """
    inside, ours = rows.inside, rows.log_probs()
    if rows.top is not None:
        values = shared_tokens(objective, rows)
        more = _inside_from_cache(objective, ours, inside)
    else:
        theirs = divergences.log_softmax(rows.other)
        values = _shared_tokens(objective, rows, theirs)
        more = _inside(objective, ours, theirs, inside)
    rows.figures["kd_positions"] = torch.cat([rows.agrees.to(values.dtype), values.new_ones(len(inside.at))])
    for each, span_of in zip(more, (inside.span_of, inside.inner_span_of), strict=True):
        values = values.index_add(0, torch.from_numpy(span_of).to(values.device), each)
    return values


def projected(objective, rows):
    """kd by `projector`: the teacher's last hidden state through a learned matrix and the student's own live head, then
    `T^2 D(teacher || student)` over the whole student vocabulary (DSKD, Zhang et al. 2024, arXiv 2406.17328, section 3.1).

    Cost: the only way that never needs the teacher's head (`N Vs Ds` multiplications instead of `N Vt Dt`). Start: 0.3
    beside lm 0.7; on two of three pairs it was 0.05 bits per byte better than plain training in the same time (RESULTS.md).
    The target is only as good as the projector, and detached: kd teaches the student, the projector learns from its own
    cross-entropy.
    """
    temperature = objective.config.kd_temperature
    theirs = divergences.log_softmax(rows.other.detach(), temperature)
    return _divergence(objective, rows, rows.log_probs(temperature)[: rows.num_known], theirs)


def projector_cross_entropy(objective, rows):
    """projector: next-token cross-entropy of the projected teacher, for the projector alone. No weight to choose."""
    return divergences.cross_entropy(divergences.log_softmax(rows.other), rows.labels[: rows.num_known])


def chunk_likelihood(objective, rows):
    """kd by `chunk_likelihood`: over a span that both tokenizations delimit, the likelihood of its text under both models,
    matched as a coin that shows this text or any other (ALM, Minixhofer et al. 2025, arXiv 2503.20083, section 3).

    Needs nothing of the vocabularies but a common text, so it is the way for pairs that share few tokens; learns from one
    number a span where the others learn from a distribution. `kd_temperature` softens the likelihoods (`p^(1/T)`). Cost: the
    teacher's head once. Start: 0.3, which gained 0.013 bits per byte over plain training on one of three pairs, and
    nothing on the others (RESULTS.md). `kd_top_k` means nothing here.
    """
    config = objective.config
    nats = divergences.cross_entropy(rows.log_probs(), rows.labels)
    ours = divergences.span_log_probs(nats, rows.span_of, rows.num_known)
    starts = torch.zeros_like(ours, dtype=torch.bool)
    starts[rows.span_of[rows.span_of >= 0]] = True
    values = divergences.span_divergence(ours, rows.spans.to(ours.dtype), config.kd_divergence, config.kd_temperature)
    return torch.where(starts, values, 0.0)


def layerwise(objective, match):
    """layerwise: `1 - cos` between the student's layer outputs, through a learned matrix, and those of the teacher layer at
    the same relative depth; mean over `feature_layers` layers (FitNets, arXiv 1412.6550; PKD, arXiv 1908.09355).

    Both sides are standardised dimension by dimension with numbers measured before training, so the few outlier dimensions
    of a residual stream weigh as much as any others. About 1 at the start, never above 2. Cost: `N Ds Dt` multiplications
    and two `[N, Dt]` matrices a layer. Start: 0.3; on three pairs 0.000 to 0.011 bits per byte worse than the default
    without it in the same time (RESULTS.md). Says much the same as routing_feature.
    """
    maps, ours, theirs = objective.beside["layerwise"], match.student.layers, match.teacher.layers
    values = [divergences.one_minus_cosine(*each(a, b)) for each, a, b in zip(maps, ours, theirs, strict=True)]
    return torch.stack(values).mean(dim=0)


def attention_maps(objective, match):
    """attention: KL from the teacher's attention map to the student's over spans that both tokenizations delimit
    (`features.span_map`), mean over the last `attention_layers` layers (MiniLM, Wang et al. 2020, arXiv 2002.10957, eq. 3).

    For tasks where it matters *what is looked at*. Cost: queries and keys of those layers only, `H K S` floats a layer
    while it runs. Start: 0.03; on three pairs 0.012 to 0.031 bits per byte worse than the default without it in the same
    time (RESULTS.md). 0.007 in the preset. Only aligned, learned positions are rows; a conversation's prompt is not seen.
    """
    values = [
        torch.cat([divergences.forward_kl(a, b) for a, b in zip(ours, theirs, strict=True)])
        for ours, theirs in zip(match.student.maps, match.teacher.maps, strict=True)
    ]
    return torch.stack(values).mean(dim=0)


def attention_alignment(objective, match):
    """attention_alignment: KL between relations, which positions' queries (keys, values) are alike, mean over q, k, v and
    the last `attention_layers` layers (MiniLMv2, Wang et al. 2021, arXiv 2012.15828). Any number of heads on either side,
    grouped or not: relation heads are cut anew.

    Carries structure between models of any shape without a learned map. Cost: `3 K^2 W` multiplications a window and layer.
    Start: 0.01; on three pairs 0.064 to 0.076 bits per byte worse than the default without it in the same time (RESULTS.md):
    its steps cost 1.8 of the default's at the study's small shapes. Relations look back only.
    """
    values = [
        torch.stack([_relation_kl(a, b, match.by_window) for a, b in zip(ours, theirs, strict=True)]).mean(dim=0)
        for ours, theirs in zip(match.student.vectors, match.teacher.vectors, strict=True)
    ]
    return torch.stack(values).mean(dim=0)


def routing_feature(objective, match):
    """routing_feature: `1 - cos` between the student's last state, through a learned matrix, and a mixture of the tapped
    teacher layers that the student's state chooses (`router.LayerRouter`; the idea of choosing what to learn from by the
    student's state follows Jang et al. 2019, arXiv 1905.05901). Its weights are recorded as `routing_0`, `routing_1`, ...

    Where no fixed layer mapping fits. Cost: one map and K standardised `[N, Dt]` matrices. Start: 0.3; on one of three pairs
    0.017 bits per byte worse than the default without it in the same time, not told from it on the others (RESULTS.md). 0.01
    in the preset.
    """
    mapped, target, weights = objective.beside["routing_feature"](match.state, match.teacher.layers)
    for layer, weight in enumerate(weights.detach().unbind(dim=1)):
        match.figures[f"routing_{layer}"] = weight
    return divergences.one_minus_cosine(mapped, target)


def contrastive(objective, match):
    """contrastive: InfoNCE between the student's last state, through a learned matrix, and the teacher's at the same
    position; the other spans of the same window are the negatives (CRD, Tian et al. 2020, arXiv 1910.10699; InfoNCE, arXiv
    1807.03748). Negatives stay within the window so that splitting a step into micro-batches changes nothing.

    Tells positions apart instead of matching directions; about ln K for K spans at the start. Cost: `K^2 Dt` a window.
    Start: 0.15 with a student from scratch, which gained 0.02 to 0.03 bits per byte over the default without it in the same
    time, from a teacher cache; with one that was trained before nothing, or 0.01 worse (RESULTS.md). 0.007 in the preset.
    """
    mapped, target = objective.beside["contrastive"](match.state, match.teacher.hidden)
    windows = zip(mapped.split(match.by_window), target.split(match.by_window), strict=True)
    return torch.cat([divergences.info_nce(ours, theirs, CONTRAST) for ours, theirs in windows])


def _shared_tokens(objective, rows, teacher):
    """`T^2 D` over shared buckets, from the teacher's log-probabilities `[m, Vt]`."""
    ours = _in_buckets(objective, rows.log_probs()[: rows.num_known], objective.student_buckets)
    values = _divergence(objective, rows, ours, _in_buckets(objective, teacher, objective.teacher_buckets))
    return torch.where(rows.agrees, values, 0.0)


def _inside(objective, ours, theirs, inside):
    """Divergences at the positions inside tokens of the other side, of the student and of the teacher."""
    how = objective.config.kd_divergence, objective.config.kd_temperature
    ours_in_pieces = _of_pieces(objective, ours, inside)
    theirs_in_pieces = divergences.bucket_log_probs(
        divergences.log_softmax(inside.logits), objective.teacher_buckets, objective.buckets.num
    )
    told = theirs_in_pieces, np.arange(len(inside.logits))
    sides = (
        ((theirs, inside.span_of), ours_in_pieces, inside.nodes),
        ((ours, inside.inner_span_of), told, inside.inner_nodes),
    )
    return [trie.divergence(*each, *how) for trie, each in zip(objective.tries, sides, strict=True)]


def _of_pieces(objective, log_probs, inside):
    """The student's buckets at its positions inside a token of the teacher's, and which of them each place reads."""
    told = divergences.bucket_log_probs(log_probs[inside.at], objective.student_buckets, objective.buckets.num)
    return told, np.arange(len(inside.at))


def _inside_from_cache(objective, ours, inside):
    """The same from what a cached teacher said there, in short."""
    config = objective.config
    in_pieces = _of_pieces(objective, ours, inside)
    sides = (
        (inside.said, *in_pieces, inside.nodes),
        (inside.inner_log_probs, ours, inside.inner_span_of, inside.inner_nodes),
    )
    values = []
    for trie, (said, log_probs, rows, nodes) in zip(objective.tries, sides, strict=True):
        said = said.truncate(config.kd_top_k) if config.kd_top_k else said
        values.append(trie.divergence_from(said, log_probs, rows, nodes, config.kd_divergence, config.kd_temperature))
    return values


def _in_buckets(objective, log_probs, bucket_of):
    """Log-probabilities of the buckets at the config's temperature."""
    told = divergences.bucket_log_probs(log_probs, bucket_of, objective.buckets.num)
    temperature = objective.config.kd_temperature
    return told if temperature == 1.0 else divergences.log_softmax(told, temperature)


def _divergence_from_top(objective, rows, student):
    """`T^2 D` over the teacher's top tokens and one tail, from the student's buckets and `rows.top`."""
    config = objective.config
    top = rows.top.truncate(config.kd_top_k) if config.kd_top_k else rows.top
    kept = objective.student_buckets[objective.head.columns(top.ids)]
    rows.figures["kd_covered"] = 1.0 - top.log_probs[:, -1].exp()
    ours = divergences.gather_with_tail(student, kept)
    return divergences.tempered_divergence(ours, top.log_probs, config.kd_divergence, config.kd_temperature)


def _divergence(objective, rows, student, teacher):
    """`T^2 D` of log-probabilities at the temperature T over one support, cut to `kd_top_k` and a tail where asked for."""
    config = objective.config
    if config.kd_top_k:
        student, teacher, rows.figures["kd_covered"] = divergences.top_k_with_tail(student, teacher, config.kd_top_k)
    return divergences.tempered_divergence(student, teacher, config.kd_divergence, config.kd_temperature)


def _relation_kl(ours, theirs, by_window):
    """KL of the relations of one kind of vector `[N, W]`, windows apart, relation heads averaged: `[N]`."""
    heads = features.relation_heads(ours.shape[1], theirs.shape[1], features.RELATION_HEADS)
    windows = zip(ours.split(by_window), theirs.split(by_window), strict=True)
    related = [(features.relations(a, heads), features.relations(b, heads)) for a, b in windows]
    return torch.cat([divergences.forward_kl(a, b).mean(dim=0) for a, b in related])


COUNTED = {"kd_covered": "aligned", "kd_positions": "labels"}
"""Figures of parts on logits, and the positions that each is a mean over."""
LM = {"lm": LossTerm(next_token, "labels")}
KD = {
    "none": {},
    "shared_vocab": {"kd": LossTerm(shared_tokens, "aligned")},
    "shared_prefix": {"kd": LossTerm(shared_tokens, "aligned")},
    "inside_tokens": {"kd": LossTerm(inside_tokens, "aligned")},
    "projector": {
        "kd": LossTerm(projected, "aligned"),
        "projector": LossTerm(projector_cross_entropy, "aligned", student=False),
    },
    "chunk_likelihood": {"kd": LossTerm(chunk_likelihood, "spans")},
}
FEATURES = {
    "layerwise": LossTerm(layerwise, "aligned", on="layers", phase=0.3),
    "attention": LossTerm(attention_maps, "aligned", on="below", phase=0.3),
    "attention_alignment": LossTerm(attention_alignment, "aligned", on="below", phase=0.3),
    "routing_feature": LossTerm(routing_feature, "aligned", on="state", phase=0.3),
    "contrastive": LossTerm(contrastive, "aligned", on="state", phase=0.6),
}


def active_terms(config):
    """The parts that a config asks for, by name."""
    wanted = {**LM, **KD[config.kd_method], **FEATURES}
    return {name: part for name, part in wanted.items() if not part.student or getattr(config, f"{name}_weight") > 0}
