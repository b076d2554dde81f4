"""The training objective: the weighted sum of the loss terms of one micro-batch."""

import numpy as np
import torch

from kdlib.config import BY_BUCKETS
from kdlib.data.windowing import IGNORE
from kdlib.losses import chunked_head, divergences
from kdlib.losses.partial_tokens import PartialTokens, agreement_mask
from kdlib.models import forward
from kdlib.training import optimizer
from kdlib.training.terms import METRIC_NORMALISERS, FeatureBatch, LogitsBlock, active_terms

MEASURE_SCALE = 2.0**12
"""Scale of losses whose gradient is only measured: under autocast some gradients pass through float16."""


class Objective(torch.nn.Module):
    """The student and its adapters. `forward` computes the loss of one micro-batch.

    The student learns from logits as in `chunked_head`: the teacher side of a term trains the projector's weight only.
    `adapters` are the modules that some terms train, by term name. `buckets` (`vocab.Buckets`) and the live
    `teacher_head` (None with a cache) serve `config.BY_BUCKETS`, `tries` (`trie.tries_of`) serve `byte_prefix`.
    `layers` and `attention_layers` are pairs `(student's, teacher's)` of tapped layers. All trained parameters belong
    to this module, so that a distributed wrapper synchronises them.
    """

    def __init__(
        self, student, head, config, adapters=None, teacher_head=None, buckets=None, layers=((), ()),
        attention_layers=((), ()), tries=None,
    ):  # fmt: skip
        super().__init__()
        self.student = student
        self.head = head
        self.config = config
        self.adapters = torch.nn.ModuleDict(adapters or {})
        self.teacher_head = teacher_head
        self.terms = active_terms(config)
        self.layers, self.attention_layers, self.tries = layers, attention_layers, tries
        self.chunk_sizes = None
        self.buckets = buckets
        if buckets is not None:
            self.register_buffer("student_buckets", head.by_column(buckets.student), persistent=False)
        if buckets is not None and teacher_head is not None:
            self.register_buffer("teacher_buckets", teacher_head.by_column(buckets.teacher), persistent=False)

    def weights(self, progress=1.0):
        """Returns the weight of each term at `progress`, a fraction of the planned steps."""
        return {
            name: self.phase_factor(name, progress)
            * (getattr(self.config, f"{name}_weight") if term.trains_student else 1.0)
            for name, term in self.terms.items()
        }

    def phase_factor(self, name, progress):
        return optimizer.ramp(progress, self.terms[name].starts_at) if self.config.use_curriculum else 1.0

    def teacher_request(self, weights):
        """Returns the keyword arguments for `Teacher` that the active terms need."""
        method = self.config.kd_method if "kd" in self.terms else "none"
        by_method = {"spans": method == "chunk_likelihood", "inner": method == "byte_prefix"}
        return {"taps": self._taps(weights, 1), **by_method}

    def forward(self, batch, signal, counts, weights=None, measure=False):
        """Returns `(loss, parts, grad_sq_norms)` of one micro-batch.

        `loss` is the weighted sum for backward. `parts` are the unweighted terms and the metrics, `[]` tensors by name.
        With `measure`, `grad_sq_norms` holds for each term of the student the squared norm of its weighted gradient. It
        is measured at the last hidden states for terms on logits and `state`, at the tapped layers' outputs for
        `layers`, and at the input of the lowest tapped attention layer for `attention_input`.

        `counts` holds `labels`, `aligned` and `spans`, the positions of the full optimizer step, so that the losses of
        its micro-batches sum to the loss of the step. `weights` (default: the config's) may switch terms off by 0.
        """
        weights = self.weights() if weights is None else weights
        rows_by_window = batch.rows_by_window
        student = forward.read(
            self.student, batch.student_ids, batch.student_windows, batch.student_rows, rows_by_window,
            self._taps(weights, 0), batch.student_row_slices,
        )  # fmt: skip
        hidden = student.last.flatten(0, 1)
        loss, parts, grad_sq_norms = self._logits_terms(batch, hidden, signal, counts, weights, measure)
        if any(weights[name] > 0 and term.reads != "logits" for name, term in self.terms.items()):
            features = FeatureBatch(student, signal, hidden[batch.student_rows], rows_by_window)
            losses, feature_norms = self._feature_terms(features, counts, weights, measure)
            loss = loss + sum(weights[name] * value for name, value in losses.items())
            parts |= {name: value.detach() for name, value in losses.items()}
            parts |= {name: divergences.token_mean(v, counts["aligned"]) for name, v in features.metrics.items()}
            grad_sq_norms |= feature_norms
        return self._touch_idle_adapters(loss, weights), parts, grad_sq_norms

    def _taps(self, weights, side):
        active = {name for name, weight in weights.items() if weight > 0}
        use_layers = active & ({"layerwise"} if side == 0 else {"layerwise", "routing_feature"})
        attention_layers = self.attention_layers[side]
        return forward.Taps(
            self.layers[side] if use_layers else (),
            attention_layers if "attention" in active else (),
            attention_layers if "attention_alignment" in active else (),
        )

    def _logits_terms(self, batch, hidden, signal, counts, weights, measure):
        active = {n: term for n, term in self.terms.items() if term.reads == "logits" and weights[n] > 0}
        partial = PartialTokens.build(self.tries, batch, signal.partial_topk) if self.tries and "kd" in active else None
        order, span_of, chunks = self._plan_rows(batch, signal, hidden.device, partial and partial.num_inner)
        partial = partial and partial.reordered(order)
        order = torch.from_numpy(order).to(hidden.device, non_blocking=True)
        labels = self.head.columns(batch.labels.flatten())[order]
        metrics = ["kd_covered"] if "kd" in active and self._is_truncated(signal) else []
        metrics += ["kd_positions"] if partial else []
        agrees = (
            agreement_mask(self.buckets, batch).to(hidden.device, non_blocking=True)
            if self.buckets and "kd" in active
            else None
        )

        def block_losses(logits, teacher_logits, block):
            aligned = block.aligned
            spans = torch.where(span_of[block.rows] < 0, -1, span_of[block.rows] - aligned.start)
            span_log_probs = None if signal is None or signal.span_log_probs is None else signal.span_log_probs[aligned]
            topk = None if signal is None or signal.topk is None else signal.topk.rows(aligned)
            inside, teacher_logits = partial.for_block(teacher_logits, block) if partial else (None, teacher_logits)
            rows = LogitsBlock(
                logits, labels[block.rows], aligned.stop - aligned.start, teacher_logits, spans, span_log_probs, topk,
                inside, None if agrees is None else agrees[aligned],
            )  # fmt: skip
            means = [divergences.token_mean(t.fn(self, rows), counts[t.normaliser]) for t in active.values()]
            means += [divergences.token_mean(rows.metrics[m], counts[METRIC_NORMALISERS[m]]) for m in metrics]
            return torch.stack(means)

        if not active:
            return hidden.sum() * 0.0, {}, {}
        teacher_logits = None
        if {"kd", "projector"} & active.keys():
            teacher_logits = self._teacher_logits(signal, partial and partial.teacher_row_order(chunks))
        extra = tuple(self.adapters["projector"].parameters()) if "projector" in active else ()
        row_weights = [weights[name] for name in active] + [0.0] * len(metrics)
        head = self.head.weight, self.head.bias
        loss, parts = chunked_head.chunked_head_losses(
            hidden[order], *head, chunks, block_losses, row_weights, teacher_logits, extra, self.head.transform
        )
        grad_sq_norms = {}
        if measure:
            frozen_head = tuple(None if tensor is None else tensor.detach() for tensor in head)
            for i, name in enumerate(active):
                if self.terms[name].trains_student:
                    states = hidden[order].detach().requires_grad_()
                    only = [weight * (i == j) for j, weight in enumerate(row_weights)]
                    term_loss, _ = chunked_head.chunked_head_losses(
                        states, *frozen_head, chunks, block_losses, only, teacher_logits, transform=self.head.transform
                    )
                    grad_sq_norms[name] = torch.autograd.grad(term_loss, states)[0].float().square().sum()
        return loss, dict(zip([*active, *metrics], parts, strict=True)), grad_sq_norms

    def _feature_terms(self, features, counts, weights, measure):
        """Computes the means of the terms on features, and their squared gradient norms with `measure`."""
        student = features.student
        inputs = {"state": (features.state,), "layers": student.layers, "attention_input": (student.attention_input,)}
        losses, grad_sq_norms = {}, {}
        for name, term in self.terms.items():
            if term.reads != "logits" and weights[name] > 0:
                with torch.autocast(features.state.device.type, enabled=False):  # the formulas compute in float32
                    losses[name] = divergences.token_mean(term.fn(self, features), counts[term.normaliser])
                if measure and losses[name].requires_grad:
                    scaled = MEASURE_SCALE * weights[name] * losses[name]
                    gradients = torch.autograd.grad(scaled, inputs[term.reads], retain_graph=True, allow_unused=True)
                    squares = [(g.float() / MEASURE_SCALE).square().sum() for g in gradients if g is not None]
                    grad_sq_norms[name] = sum(squares)
        return losses, grad_sq_norms

    def _teacher_logits(self, signal, row_order=None):
        """Returns the function of teacher logits for `chunked_head.chunked_head_losses`, or None if no term needs them.

        `row_order`: indices into the teacher's states `[hidden; partial_hidden]`; None: the aligned positions in order.
        """
        if signal is None or self.config.kd_method in ("none", "chunk_likelihood") or self._is_topk_only(signal):
            return None
        if self.config.kd_method == "projector":
            return lambda rows: self.head.decode(self.adapters["projector"](signal.hidden[rows]))
        weight, device, decode = self.teacher_head.weight, signal.hidden.device, self.teacher_head.decoder()
        if row_order is not None:
            states, row_order = (
                torch.cat([signal.hidden, signal.partial_hidden]),
                torch.from_numpy(row_order).to(device, non_blocking=True),
            )
            return lambda rows: decode(states[row_order[rows]].to(weight.device, weight.dtype)).to(device)
        return lambda rows: decode(signal.hidden[rows].to(weight.device, weight.dtype)).to(device)

    def _is_topk_only(self, signal):
        return signal.topk is not None and self.config.kd_method in BY_BUCKETS

    def _is_truncated(self, signal):
        """Returns whether kd compares top-k tokens and a tail instead of all tokens."""
        truncated = self.config.kd_top_k > 0 and self.config.kd_method != "chunk_likelihood"
        return truncated or self._is_topk_only(signal)

    def plan_chunk_sizes(self):
        """Returns the head's `(chunk_size, block_size)`, fixed for the run: they decide the order of summation, which
        must not depend on free memory.
        """
        if self.chunk_sizes is None:
            num_columns = self.head.num_rows + (self.teacher_head or self.head).num_rows
            device, size = self.student.device, self.config.loss_chunk_size
            self.chunk_sizes = chunked_head.chunk_sizes(num_columns, device, size)
        return self.chunk_sizes

    def _plan_rows(self, batch, signal, device, num_extra=None):
        """Returns `(order, span_of, chunks)`: the flat positions to decode in the order of the blocks (an array), the
        aligned position that starts the span of each (or -1), and the chunks. `num_extra` `[N]`: extra teacher rows per
        aligned position.
        """
        labels, starts, ends = batch.spans_of("student")
        is_decoded = labels != IGNORE
        if signal is None:
            starts, ends = starts[:0], ends[:0]
        is_decoded[starts] = True
        rows = np.flatnonzero(is_decoded)
        previous = np.searchsorted(starts, rows, side="right") - 1  # the last aligned position up to each row
        in_span = (previous >= 0) & (rows < np.append(ends, 0)[previous])
        is_aligned = np.isin(rows, starts, assume_unique=True)
        order, chunks = chunked_head.plan_blocks(~in_span | is_aligned, is_aligned, *self.plan_chunk_sizes(), num_extra)
        span_of = torch.from_numpy(np.where(in_span, previous, -1)[order]).to(device, non_blocking=True)
        return rows[order], span_of, chunks

    def _touch_idle_adapters(self, loss, weights):
        """Adds zero gradients for adapters of inactive terms: a distributed wrapper waits for every parameter."""
        idle = [self.adapters[name] for name in self.adapters if not weights[name] > 0]
        return loss + sum(0.0 * p.sum() for module in idle for p in module.parameters()) if idle else loss

    def total(self, parts, weights=None):
        """Returns the student's loss and each term's share of it, from unweighted `parts` (floats)."""
        weights = self.weights() if weights is None else weights
        weighted = {n: weights[n] * parts[n] for n, t in self.terms.items() if t.trains_student and weights[n] > 0}
        loss = sum(weighted.values())
        return loss, {name: value / loss if loss else 0.0 for name, value in weighted.items()}
