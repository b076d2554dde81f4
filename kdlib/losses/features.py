"""Attention maps and relations at the token boundaries that two tokenizations share. Shape suffixes: B rows, L
positions, H heads, K common boundaries of a window, S its tokens, D head width, W width of all heads together, R
relation heads.
"""

import math

import torch

from kdlib.losses import divergences

MASKED = -1e9
RELATION_HEADS = 12
"""Maximum number of relation heads; more heads give finer relations. Wang et al. 2021 use 12 to 48."""


def block_diagonal(windows_BL):
    """Returns the causal attention mask of packed rows, bool `[B, 1, L, L]`: positions attend only within their window.
    `windows_BL` is the window number of each position; padding (0) counts as one more, so no row of the mask is empty.
    """
    length = windows_BL.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool, device=windows_BL.device).tril()
    return ((windows_BL[:, :, None] == windows_BL[:, None, :]) & causal)[:, None]


def restart_positions(windows_BL):
    """Returns position ids `[B, L]` that restart at 0 in each window; 0 for padding."""
    positions = torch.arange(windows_BL.shape[1], device=windows_BL.device).expand_as(windows_BL)
    is_start = torch.ones_like(windows_BL, dtype=torch.bool)
    is_start[:, 1:] = windows_BL[:, 1:] != windows_BL[:, :-1]
    starts = torch.where(is_start, positions, 0).cummax(dim=1).values
    return (positions - starts) * (windows_BL > 0)


def span_map(query_HKD, key_HSD, ends_K, scaling):
    """Computes the log attention from the last token of each span to each span, `[K, K]`, averaged over heads.

    `ends_K` are the ascending positions at which both tokenizations have a boundary. Column k sums over the tokens
    after `ends[k - 1]` up to `ends[k]`. Tokens up to the first end (a BOS token, an attention sink on one side only)
    are masked before the softmax. Each row from the second on is thus a distribution over the spans it attends to. The
    first row and column are empty (log 1e-30). Keys may have fewer heads than queries (grouped). At least in float32.
    """
    num_ends, num_tokens = len(ends_K), key_HSD.shape[1]
    query_HKD, key_HSD = divergences.at_least_float32(query_HKD), divergences.at_least_float32(key_HSD)
    empty = query_HKD.new_full((min(1, num_ends), num_ends), math.log(divergences.TINY))
    if num_ends < 2:
        return empty
    key_HSD = key_HSD.repeat_interleave(len(query_HKD) // len(key_HSD), dim=0)
    tokens = torch.arange(num_tokens, device=ends_K.device)
    span_of = torch.searchsorted(ends_K, tokens)
    visible = (span_of > 0) & (tokens <= ends_K[1:, None])
    scores = (query_HKD[:, 1:] * scaling) @ key_HSD.transpose(1, 2)
    probs = scores.masked_fill(~visible, MASKED).softmax(dim=-1).mean(dim=0)
    pooled = probs.new_zeros(num_ends - 1, num_ends + 1).index_add(1, span_of, probs)[:, :num_ends]
    return torch.cat([empty, (pooled + divergences.TINY).log()])


def relations(vectors_KW, num_heads):
    """Computes the log-softmax `[R, K, K]` of scaled dot products `x_i . x_j / sqrt(W / R)` over the positions j <= i.
    Wang et al. 2021 (MiniLMv2), arXiv 2012.15828, eq. 1 to 3, plus a causal mask.
    """
    num_ends, width = vectors_KW.shape
    heads = divergences.at_least_float32(vectors_KW).view(num_ends, num_heads, width // num_heads).transpose(0, 1)
    scores = heads @ heads.transpose(1, 2) / math.sqrt(width // num_heads)
    future = torch.ones(num_ends, num_ends, dtype=torch.bool, device=scores.device).triu(1)
    return divergences.log_softmax(scores.masked_fill(future, MASKED))


def relation_heads(student_width, teacher_width, max_heads):
    """Returns the largest number of relation heads, at most `max_heads`, that divides both widths."""
    divisor = math.gcd(student_width, teacher_width)
    return max(heads for heads in range(1, max_heads + 1) if divisor % heads == 0)
