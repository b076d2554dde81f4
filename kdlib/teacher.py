"""The teacher: frozen, on its own device, reading its own ids of the text."""

import dataclasses

import torch

from kdlib import losses, models


@dataclasses.dataclass(frozen=True)
class TeacherSignal:
    """What the losses need of the teacher at the batch's N aligned positions.

    `hidden` `[N, Dt]`: last hidden states; `spans` `[N]`: log-likelihood of the text of the span that starts there, in
    nats, 0 where none does (None where nobody asked); `layers`, `maps`, `vectors`: as in `models.Features`.
    """

    hidden: torch.Tensor
    spans: torch.Tensor | None = None
    layers: tuple = ()
    maps: tuple = ()
    vectors: tuple = ()


class Teacher:
    """A live teacher. Not an `nn.Module`: nothing that sets a whole model to training, moves or averages it gets here.

    `teacher(batch)` gives the `TeacherSignal` on the batch's device; `taps` (`models.Taps`) and `spans` ask for more of it.
    """

    def __init__(self, model, reader):
        self.model = model.eval().requires_grad_(False)
        self.reader = reader
        self.head = models.Head(model, reader.vocabulary)

    def __call__(self, batch, taps=models.Taps(), spans=False):  # noqa: B008 - frozen
        device, away = self.model.device, batch.student_ids.device
        moved = batch.to(device)
        with torch.inference_mode():
            found = models.read(
                self.model, moved.teacher_ids, moved.teacher_mask, moved.teacher_rows, batch.rows_by_window, taps
            )
            last = found.last.flatten(0, 1)
            told = self._spans(last, moved) if spans else None
            signal = TeacherSignal(last[moved.teacher_rows], told, found.layers, found.maps, found.vectors)
        # copies made outside: a tensor born in inference mode can't be saved for a backward pass
        return TeacherSignal(*(_outside(getattr(signal, field.name), away) for field in dataclasses.fields(signal)))

    def _spans(self, last, batch, chunk_size=256):
        """Log-likelihood of each aligned position's span by the teacher's own tokens."""
        lengths = batch.teacher_stops - batch.teacher_rows
        span_of = torch.repeat_interleave(torch.arange(len(lengths), device=last.device), lengths)
        firsts = lengths.cumsum(0) - lengths
        rows = batch.teacher_rows[span_of] + torch.arange(len(span_of), device=last.device) - firsts[span_of]
        labels = self.head.columns(batch.teacher_labels.flatten()[rows])
        nats = [
            losses.cross_entropy(losses.log_probs(self.head.decode(last[part])), label)
            for part, label in zip(rows.split(chunk_size), labels.split(chunk_size), strict=True)
        ]
        return (
            losses.span_log_probs(torch.cat(nats), span_of, len(lengths))
            if nats
            else last.new_zeros(len(lengths)).float()
        )


def _outside(found, device):
    if found is None:
        return None
    if isinstance(found, torch.Tensor):
        return found.clone().to(device)
    return type(found)(_outside(part, device) for part in found)
