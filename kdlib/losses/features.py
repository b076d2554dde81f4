"""What an attention looks at, in units that two tokenizations share. Shape suffixes: H heads, K common boundaries of a
window, S its tokens, W features of all heads together, R relation heads.
"""

import math

import torch

from kdlib.losses import divergences

NEVER = -1e9
RELATION_HEADS = 12
"""Relation heads at most; more heads see finer relations. Wang et al. 2021 use 12 to 48."""


def block_diagonal(windows_BL):
    """Who sees whom, bool `[B, 1, L, L]`: positions up to one's own, of one's own window only. `windows_BL` says which
    window each position belongs to (0, the padding, is one more). Every position sees itself, so no row is empty.
    """
    length = windows_BL.shape[1]
    past = torch.ones(length, length, dtype=torch.bool, device=windows_BL.device).tril()
    return ((windows_BL[:, :, None] == windows_BL[:, None, :]) & past)[:, None]


def restart_positions(windows_BL):
    """Positions `[B, L]` counted from the beginning of each window; 0 for padding."""
    places = torch.arange(windows_BL.shape[1], device=windows_BL.device).expand_as(windows_BL)
    begins = torch.ones_like(windows_BL, dtype=torch.bool)
    begins[:, 1:] = windows_BL[:, 1:] != windows_BL[:, :-1]
    firsts = torch.where(begins, places, 0).cummax(dim=1).values
    return (places - firsts) * (windows_BL > 0)


def span_map(query_HKD, key_HSD, ends_K, scaling):
    """Log of the attention from the last token of each span to whole spans, `[K, K]`, heads averaged.

    `ends_K` are the positions (ascending) where both tokenizations end; column k sums over the tokens after `ends[k - 1]`
    up to `ends[k]`. What lies up to the first end (a beginning-of-text mark, which soaks up attention on one side only) is
    left out before the softmax, so each row from the second on is a distribution over the spans it can see; the first row
    and column are empty (log 1e-30). Keys may have fewer heads than queries (grouped). At least in float32.
    """
    num_ends, num_tokens = len(ends_K), key_HSD.shape[1]
    query_HKD, key_HSD = divergences.at_least_float32(query_HKD), divergences.at_least_float32(key_HSD)
    empty = query_HKD.new_full((min(1, num_ends), num_ends), math.log(divergences.TINY))
    if num_ends < 2:
        return empty
    key_HSD = key_HSD.repeat_interleave(len(query_HKD) // len(key_HSD), dim=0)
    tokens = torch.arange(num_tokens, device=ends_K.device)
    span_of = torch.searchsorted(ends_K, tokens)
    seen = (span_of > 0) & (tokens <= ends_K[1:, None])
    scores = (query_HKD[:, 1:] * scaling) @ key_HSD.transpose(1, 2)
    probs = scores.masked_fill(~seen, NEVER).softmax(dim=-1).mean(dim=0)
    pooled = probs.new_zeros(num_ends - 1, num_ends + 1).index_add(1, span_of, probs)[:, :num_ends]
    return torch.cat([empty, (pooled + divergences.TINY).log()])


def relations(vectors_KW, num_heads):
    """Log-softmax `[R, K, K]` of how alike the vectors at each pair of positions are, `x_i . x_j / sqrt(W / R)` over the
    positions j <= i. Wang et al. 2021 (MiniLMv2), arXiv 2012.15828, eq. 1 to 3; the causal mask is ours: at a position
    nothing may be used that comes after it.
    """
    num_ends, width = vectors_KW.shape
    heads = divergences.at_least_float32(vectors_KW).view(num_ends, num_heads, width // num_heads).transpose(0, 1)
    alike = heads @ heads.transpose(1, 2) / math.sqrt(width // num_heads)
    later = torch.ones(num_ends, num_ends, dtype=torch.bool, device=alike.device).triu(1)
    return divergences.log_softmax(alike.masked_fill(later, NEVER))


def relation_heads(student_width, teacher_width, at_most):
    """The largest number of relation heads, `at_most` or fewer, that divides both widths."""
    both = math.gcd(student_width, teacher_width)
    return max(heads for heads in range(1, at_most + 1) if both % heads == 0)
