"""The student's objective: which part is fed what, and one number to call backward on."""

import numpy as np
import torch

from kdlib.config import BY_BUCKETS
from kdlib.data.windowing import IGNORE
from kdlib.losses import chunked_head, divergences
from kdlib.losses.partial_tokens import PartialTokens, agreeing
from kdlib.models import loading
from kdlib.training import schedule
from kdlib.training.terms import COUNTED, FeatureBatch, LogitsBlock, active_terms

LIFT = 2.0**12
"""Gradients that are only measured are made this much larger first: under autocast some pass through float16."""


class Objective(torch.nn.Module):
    """The student with everything that is trained beside it. `forward` gives the loss of one micro-batch.

    Through its logits the student learns as `chunked_head` says: what a part makes of the head or the projector by itself
    reaches the projector's weight and nothing else. `beside` holds the modules that some parts train, by the part's name;
    `buckets` (`vocab.Buckets`) and the teacher's live `teacher_head` (None with a cache) are for `config.BY_BUCKETS`,
    `tries` (`trie.tries_of`) for `inside_tokens`; `layers` and `attention_layers` are pairs `(student's, teacher's)` of
    tapped layers. An `nn.Module`, so that a distributed wrapper sees all it has to sync.
    """

    def __init__(
        self,
        student,
        head,
        config,
        beside=None,
        teacher_head=None,
        buckets=None,
        layers=((), ()),
        attention_layers=((), ()),
        tries=None,
    ):
        super().__init__()
        self.student = student
        self.head = head
        self.config = config
        self.beside = torch.nn.ModuleDict(beside or {})
        self.teacher_head = teacher_head
        self.parts = active_terms(config)
        self.layers, self.attention_layers, self.tries = layers, attention_layers, tries
        self.rows_at_once = None
        self.buckets = buckets
        if buckets is not None:
            self.register_buffer("student_buckets", head.by_column(buckets.student), persistent=False)
        if buckets is not None and teacher_head is not None:
            self.register_buffer("teacher_buckets", teacher_head.by_column(buckets.teacher), persistent=False)

    def weights(self, progress=1.0):
        """The weight of each part at `progress` (fraction of the planned steps)."""
        factors = {name: self.phase_factor(name, progress) for name in self.parts}
        return {
            name: factors[name] * (getattr(self.config, f"{name}_weight") if p.student else 1.0)
            for name, p in self.parts.items()
        }

    def phase_factor(self, name, progress):
        return schedule.ramp(progress, self.parts[name].phase) if self.config.use_curriculum else 1.0

    def teacher_request(self, weights):
        """What the teacher is to be asked for, as keyword arguments of `Teacher`."""
        method = self.config.kd_method if "kd" in self.parts else "none"
        by_method = {"spans": method == "chunk_likelihood", "inner": method == "inside_tokens"}
        return {"taps": self._taps(weights, 1), **by_method}

    def forward(self, batch, signal, counts, weights=None, measure=False):
        """`(loss, parts, grad_sq_norms)` of one micro-batch: `loss` to call backward on; `parts` unweighted `[]` tensors by name,
        with figures that are no losses, for the record only; with `measure`, `grad_sq_norms` holds for each part of the student's
        loss the squared norm of its weighted gradient where it touches the student (last hidden states for parts on
        logits and `state`; tapped layers' outputs; for attentions the states that go into the lowest of their layers).

        `counts` holds `labels`, `aligned` and `spans`, the positions of the whole optimizer step: losses of its
        micro-batches add up to those of the step. `weights` (default: the config's) may leave parts out by 0.
        """
        weights = self.weights() if weights is None else weights
        by_window = batch.rows_by_window
        seen = loading.read(
            self.student, batch.student_ids, batch.student_windows, batch.student_rows, by_window,
            self._taps(weights, 0), batch.student_positions,
        )  # fmt: skip
        hidden = seen.last.flatten(0, 1)
        loss, parts, grad_sq_norms = self._on_logits(batch, hidden, signal, counts, weights, measure)
        if any(weights[name] > 0 and part.on != "logits" for name, part in self.parts.items()):
            match = FeatureBatch(seen, signal, hidden[batch.student_rows], by_window)
            values, more = self._on_features(match, counts, weights, measure)
            loss = loss + sum(weights[name] * value for name, value in values.items())
            parts |= {name: value.detach() for name, value in values.items()}
            parts |= {name: divergences.token_mean(value, counts["aligned"]) for name, value in match.figures.items()}
            grad_sq_norms |= more
        return self._touch_idle(loss, weights), parts, grad_sq_norms

    def _taps(self, weights, side):
        on = {name for name, weight in weights.items() if weight > 0}
        layers = on & ({"layerwise"} if side == 0 else {"layerwise", "routing_feature"})
        of_attention = self.attention_layers[side]
        return loading.Taps(
            self.layers[side] if layers else (),
            of_attention if "attention" in on else (),
            of_attention if "attention_alignment" in on else (),
        )

    def _on_logits(self, batch, hidden, signal, counts, weights, measure):
        """The parts on logits, in chunks of the head."""
        live = {n: p for n, p in self.parts.items() if p.on == "logits" and weights[n] > 0}
        inside = PartialTokens.build(self.tries, batch, signal.partial_topk) if self.tries and "kd" in live else None
        order, span_of, chunks = self._lay_out(batch, signal, hidden.device, inside and inside.more)
        inside = inside and inside.reordered(order.cpu().numpy())
        labels = self.head.columns(batch.labels.flatten())[order]
        figures = ["kd_covered"] if "kd" in live and self._is_cut(signal) else []
        figures += ["kd_positions"] if inside else []
        agrees = agreeing(self.buckets, batch).to(hidden.device) if self.buckets and "kd" in live else None

        def block_losses(logits, other, block):
            known = block.known.stop - block.known.start
            local = torch.where(span_of[block.rows] < 0, -1, span_of[block.rows] - block.known.start)
            spans = None if signal is None or signal.span_log_probs is None else signal.span_log_probs[block.known]
            top = None if signal is None or signal.topk is None else signal.topk.rows(block.known)
            within, other = inside.for_block(other, block) if inside else (None, other)
            agree = None if agrees is None else agrees[block.known]
            rows = LogitsBlock(logits, labels[block.rows], known, other, local, spans, top, within, agree)
            values = [divergences.token_mean(part.values(self, rows), counts[part.counts]) for part in live.values()]
            values += [divergences.token_mean(rows.figures[name], counts[COUNTED[name]]) for name in figures]
            return torch.stack(values)

        if not live:
            return hidden.sum() * 0.0, {}, {}
        extra = tuple(self.beside["projector"].parameters()) if "projector" in live else ()
        row_weights = [weights[name] for name in live] + [0.0] * len(figures)
        compared = (
            self._compared(signal, inside and inside.teacher_row_order(chunks))
            if {"kd", "projector"} & live.keys()
            else None
        )
        head = self.head.weight, self.head.bias
        loss, parts = chunked_head.chunked_head_losses(
            hidden[order], *head, chunks, block_losses, row_weights, compared, extra
        )
        grad_sq_norms = {}
        if measure:
            fixed = tuple(None if tensor is None else tensor.detach() for tensor in head)
            for i, name in enumerate(live):
                if self.parts[name].student:
                    rows = hidden[order].detach().requires_grad_()
                    only = [weight * (i == j) for j, weight in enumerate(row_weights)]
                    alone, _ = chunked_head.chunked_head_losses(rows, *fixed, chunks, block_losses, only, compared)
                    grad_sq_norms[name] = torch.autograd.grad(alone, rows)[0].float().square().sum()
        return loss, dict(zip([*live, *figures], parts, strict=True)), grad_sq_norms

    def _on_features(self, match, counts, weights, measure):
        """The parts on features: their means, and the squared gradient norms where `measure`d."""
        touched = {"state": (match.state,), "layers": match.student.layers, "below": (match.student.below,)}
        values, grad_sq_norms = {}, {}
        for name, part in self.parts.items():
            if part.on != "logits" and weights[name] > 0:
                with torch.autocast(match.state.device.type, enabled=False):  # in float32, as the formulas make it
                    values[name] = divergences.token_mean(part.values(self, match), counts[part.counts])
                if measure and values[name].requires_grad:
                    lifted = LIFT * weights[name] * values[name]
                    found = torch.autograd.grad(lifted, touched[part.on], retain_graph=True, allow_unused=True)
                    grad_sq_norms[name] = sum((g.float() / LIFT).square().sum() for g in found if g is not None)
        return values, grad_sq_norms

    def _compared(self, signal, taken=None):
        """What a chunk's known rows are compared with, as `chunked_head.chunked_head_losses` asks for it. `taken`: which of the
        teacher's states, the inner ones behind the others; None: those at the known rows.
        """
        if signal is None or self.config.kd_method in ("none", "chunk_likelihood") or self._knows_top_only(signal):
            return None
        if self.config.kd_method == "projector":
            return lambda known: self.head.decode(self.beside["projector"](signal.hidden[known]))
        weight, device, decode = self.teacher_head.weight, signal.hidden.device, self.teacher_head.decoder()
        if taken is not None:
            states, taken = torch.cat([signal.hidden, signal.partial_hidden]), torch.from_numpy(taken).to(device)
            return lambda others: decode(states[taken[others]].to(weight.device, weight.dtype)).to(device)
        return lambda known: decode(signal.hidden[known].to(weight.device, weight.dtype)).to(device)

    def _knows_top_only(self, signal):
        return signal.topk is not None and self.config.kd_method in BY_BUCKETS

    def _is_cut(self, signal):
        """Whether kd compares some tokens and a tail, not all."""
        cut = self.config.kd_top_k > 0 and self.config.kd_method != "chunk_likelihood"
        return cut or self._knows_top_only(signal)

    def _lay_out(self, batch, signal, device, more=None):
        """`(order, span_of, chunks)`: the flat positions with a label, those of a span together, in the order in which
        `chunked_head` takes them; which aligned position starts the span of each, -1 for none; the chunks of blocks. `more`
        `[N]`: how many rows an aligned position is compared with besides one.
        """
        labels, firsts, stops = (
            tensor.cpu().numpy() for tensor in (batch.labels.flatten(), batch.student_rows, batch.student_span_ends)
        )
        wanted = labels != IGNORE
        if signal is None:
            firsts, stops = firsts[:0], stops[:0]
        wanted[firsts] = True
        rows = np.flatnonzero(wanted)
        before = np.searchsorted(firsts, rows, side="right") - 1  # the last aligned position up to each row
        inside = (before >= 0) & (rows < np.append(stops, 0)[before])
        known = np.isin(rows, firsts, assume_unique=True)
        if self.rows_at_once is None:  # once: sums keep their order however free memory changes
            columns = self.head.num_rows + (self.teacher_head or self.head).num_rows
            self.rows_at_once = chunked_head.chunk_sizes(columns, device, self.config.loss_chunk_size)
        order, chunks = chunked_head.plan_blocks(~inside | known, known, *self.rows_at_once, more)
        spans = torch.from_numpy(np.where(inside, before, -1)[order]).to(device)
        return torch.from_numpy(rows[order]).to(device), spans, chunks

    def _touch_idle(self, loss, weights):
        """A distributed wrapper waits for every parameter's gradient: those of parts that are off get a zero."""
        idle = [self.beside[name] for name in self.beside if not weights[name] > 0]
        return loss + sum(0.0 * p.sum() for module in idle for p in module.parameters()) if idle else loss

    def total(self, parts, weights=None):
        """The student's loss and each part's share of it, from unweighted parts (floats)."""
        weights = self.weights() if weights is None else weights
        weighted = {n: weights[n] * parts[n] for n, p in self.parts.items() if p.student and weights[n] > 0}
        loss = sum(weighted.values())
        return loss, {name: value / loss if loss else 0.0 for name, value in weighted.items()}
