"""Live notebook panel of a run: progress, alerts and a figure.

    panel = live_panel.LivePanel()
    for record in distill(config, out, on_progress=panel.progress):
        panel.update(record)
    panel.close()

It uses less than 1 % of the time, and its errors never stop the run. Without an interactive front end, it writes a line of
progress to stderr every minute, and shows one figure at `close`.
"""

import contextlib
import html
import math
import sys
import warnings
from pathlib import Path

from kdlib import environment, files, progress
from kdlib.clock import Clock, format_duration
from kdlib.report.live_figure import live_figure
from kdlib.report.style import NAMES, known, number, written

TEXT_SHARE, FIGURE_SHARE = 0.0015, 0.006
"""Maximum shares of the time for text and figures."""
INITIAL_TEXT_S, INITIAL_FIGURE_FACTOR = 0.01, 2.5
"""Initial cost estimates: seconds of a text update, and cost of a figure as a multiple of an empty one's."""
MAX_RECORDS = 1500
"""Train records kept per student. Longer runs keep every second, then every fourth."""
MAX_ALERTS = 4
LINE_EVERY_S = 60.0
"""Seconds between two lines of progress without an interactive front end."""
HOW_TO_STOP = "To pause, interrupt this cell (■): the run saves a checkpoint. Run the cell again to resume."
STYLE = """<style>
.kdlib-panel { font-size: 13px; line-height: 1.5; max-width: 1040px; color: var(--jp-ui-font-color1, inherit); }
.kdlib-panel table { border-spacing: 0; }
.kdlib-panel td { padding: 0 12px 0 0; white-space: nowrap; text-align: left; }
.kdlib-panel progress { width: 320px; height: 12px; accent-color: #0072B2; vertical-align: middle; }
.kdlib-panel .alert { border-left: 4px solid #D55E00; padding: 1px 8px; margin: 4px 0; }
.kdlib-panel .quiet { opacity: 0.75; }
.kdlib-figure { max-width: 1040px; width: 100%; }
body[data-jp-theme-light="false"] .kdlib-figure, body.vscode-dark .kdlib-figure {
  filter: invert(0.95) hue-rotate(180deg) brightness(1.3);
}
</style>"""
"""Figures use the light theme; CSS inverts their lightness on a dark page."""


class RenderBudget:
    """Limit on rendering time: a `share` of the time since the start."""

    def __init__(self, clock, share, expected_s):
        self.clock, self.share, self.expected_s = clock, share, expected_s
        self.opened, self.spent_s = clock.now(), 0.0

    def allows(self):
        """Returns whether another rendering, at the recent maximum cost, stays within the share."""
        return self.spent_s + self.expected_s <= self.share * (self.clock.now() - self.opened)

    @contextlib.contextmanager
    def spending(self):
        started = self.clock.now()
        try:
            yield
        finally:
            duration_s = self.clock.now() - started
            self.spent_s += duration_s
            self.expected_s = max(duration_s, 0.9 * self.expected_s)


def kernel():
    """Returns the IPython kernel of this process, or None."""
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    return getattr(shell, "kernel", None)


def has_front_end():
    """Whether the running cell has an interactive front end. Editors allow a cell to ask for input; batch runners
    (papermill, nbconvert, nbval) do not.
    """
    current = kernel()
    if current is None or environment.in_batch_kernel():
        return False
    request = current.get_parent("shell") or {}
    return bool(request.get("content", {}).get("allow_stdin"))


def show(content):
    """Displays a widget, or the bytes of a PNG."""
    from IPython import display

    display.display(display.Image(content) if isinstance(content, bytes) else content)


class LivePanel:
    """Live display of the records of `kdlib.distill`. Pass `progress` to its `on_progress`.

    `out`: the run folder, to include earlier sessions. `clock`: a `clock.Clock`. `problem` is the first exception in the
    panel, or None.
    """

    def __init__(self, out=None, clock=None):
        self.out, self.clock, empty_s = out, clock or Clock(), 0.0
        self.history, self.problem, self.widgets, self.closed = History(), None, None, False
        with self._isolated():
            if has_front_end():
                self.widgets = Widgets()
                empty_s = -self.clock.now()
                live_figure([]).png()
                empty_s += self.clock.now()
        self.lines = None if self.widgets else progress.Progress("loading", LINE_EVERY_S)
        self.opened, self.spent_s = self.clock.now(), 0.0
        self.text = RenderBudget(self.clock, TEXT_SHARE, INITIAL_TEXT_S)
        self.figure = RenderBudget(self.clock, FIGURE_SHARE, INITIAL_FIGURE_FACTOR * empty_s)
        self.num_drawn = 0

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    @property
    def share(self):
        """The panel's share of the time since it was opened."""
        return self.spent_s / max(self.clock.now() - self.opened, 1e-9)

    def update(self, record):
        """Shows a record of any kind. Never raises."""
        started = self.clock.now()
        if self.problem is None or not self.widgets:
            with self._isolated():
                self._show_record(record)
        self.spent_s += self.clock.now() - started

    def progress(self, phase, done, total):
        """Shows the phase between two records, as the `on_progress` of `distill`. Never raises."""
        started = self.clock.now()
        with self._isolated():
            self.history.phase = f"{phase}: {done:,} of {total:,}" if total else phase
            if self.lines:
                self.lines(phase, done, total)
            elif self.problem is None and self.text.allows():
                with self.text.spending():
                    self.widgets.show_text(self.history, started)
        self.spent_s += self.clock.now() - started

    def close(self):
        """Shows the final state. Without a front end, displays the figure in a notebook, or returns it elsewhere."""
        if self.closed:
            return None
        self.closed, figure = True, None
        if self.lines:
            self.lines.close()
        if self.problem is None or not self.widgets:
            with self._isolated():
                figure = self._show_last()
        if self.problem is not None:
            kind, text = type(self.problem).__name__, str(self.problem).strip().splitlines() or [""]
            warnings.warn(f"the panel stopped, the run did not: {kind}: {text[0][:200]}", stacklevel=2)
        return figure

    def _show_last(self):
        if self.widgets:
            self.widgets.show_text(self.history, self.clock.now())
            if self.history.trained:
                self.widgets.show_figure(live_figure(self.history.all()).png())
        elif self.history.trained:
            figure = live_figure(self.history.all())
            if kernel() is None:
                return figure
            show(figure.png())
        return None

    def _show_record(self, record):
        if record["kind"] == "start" and record.get("resumed") and self.out:
            for earlier_record in files.read_records(Path(self.out) / "records.jsonl"):
                self.history.add(earlier_record, self.clock.now())
        self.history.add(record, self.clock.now())
        if self.lines and record["kind"] == "train":
            name = f"{NAMES[record['run']]} {record['repeat'] + 1}"
            self.lines.train(
                name, record["step"] or 0, record["last_step"] or 0, f"{_format_seconds(record['left_s'])} left"
            )
        if not self.widgets:
            return
        if self.text.allows():
            with self.text.spending():
                self.widgets.show_text(self.history, self.clock.now())
        if self.history.count > self.num_drawn and self.figure.allows():
            with self.figure.spending():
                self.widgets.show_figure(live_figure(self.history.all()).png())
            self.num_drawn = self.history.count

    @contextlib.contextmanager
    def _isolated(self):
        try:
            yield
        except Exception as problem:  # noqa: BLE001 - must not stop the run; `close` warns
            self.problem = self.problem or problem


class History:
    """Records of a run for a figure, with a bounded number of train records."""

    def __init__(self):
        self.trained, self.strides, self.scored, self.alerts, self.last = {}, {}, [], [], {}
        self.count, self.started, self.phase = 0, 0.0, "loading"

    def all(self):
        return [*self.scored, *(record for rows in self.trained.values() for record in rows)]

    def add(self, record, now):
        """Adds a record that arrived at time `now`."""
        kind = record["kind"]
        if kind == "train":
            self._add_trained(record)
        elif kind == "eval":
            self.scored.append(record)
        elif kind == "alert":
            self.alerts.append(record)
        self.count += kind in ("train", "eval")
        self.last[kind], self.last["any"], self.phase = record, record, ""
        self.started = now if kind == "start" else self.started

    def _add_trained(self, record):
        arm = record["run"], record["repeat"]
        rows, stride = self.trained.setdefault(arm, []), self.strides.setdefault(arm, 1)
        if rows and (rows[-1]["step"] or 0) % stride:
            rows.pop()  # kept only as the newest record
        rows.append(record)
        if len(rows) > MAX_RECORDS:
            self.strides[arm] = 2 * stride
            rows[:-1] = [r for r in rows[:-1] if (r["step"] or 0) % (2 * stride) == 0]


class Widgets:
    """Widgets of the panel: status with progress bars, alerts, and a figure."""

    def __init__(self):
        import ipywidgets

        style, self.head, notice, self.alerts = (ipywidgets.HTML() for _ in range(4))
        style.value, self.head.value, notice.value = STYLE, _box("Loading the models …"), _box(HOW_TO_STOP)
        self.picture = ipywidgets.Image(format="png", layout=ipywidgets.Layout(display="none"))
        self.picture.add_class("kdlib-figure")
        show(ipywidgets.VBox([style, self.head, notice, self.alerts, self.picture]))

    def show_text(self, history, now):
        self._set(self.head, _box(_headline(history) + _bars(history, now)))
        self._set(
            self.alerts, _box("".join(map(_alert, reversed(history.alerts[-MAX_ALERTS:]))) + _hidden(history.alerts))
        )

    def show_figure(self, picture):
        self.picture.value = picture
        self.picture.layout.display = None

    def _set(self, widget, text):
        if widget.value != text:
            widget.value = text


def _box(inside):
    return f"<div class='kdlib-panel'>{inside}</div>"


def _headline(history):
    """Returns the status line, and the current phase below it."""
    phase = f"<div class='quiet'>{html.escape(history.phase)} …</div>" if history.phase else ""
    return (_state(history) if history.last else "") + phase


def _state(history):
    last = history.last["any"]
    if last["kind"] == "verdict":
        return f"<div><b>Done.</b> {html.escape(last['sentence'])}</div>"
    if last["kind"] == "paused":
        return f"<div><b>Paused:</b> {html.escape(last['reason'])}. Run the same cell again to resume.</div>"
    if last["kind"] == "reading":
        return f"<div>{html.escape(last['text'])}</div>"
    if "train" not in history.last:
        return "<div>The models are loaded; scoring them before training …</div>"
    train = history.last["train"]
    loss = f"{train['loss']:.3f} nats" if known([train["loss"]]) and not train["skipped"] else "not finite"
    step, last_step = (written(train[name], ",") for name in ("step", "last_step"))
    fields = [f"<b>{NAMES[train['run']]}</b>", f"step {step} of {last_step}", f"loss {loss}"]
    key = train["run"], train["repeat"], "validation"
    scored = [r for r in history.scored if (r["run"], r["repeat"], r["split"]) == key and known([r["bits_per_byte"]])]
    if scored:
        best = min(scored, key=lambda r: r["bits_per_byte"])
        fields.append(f"best {best['bits_per_byte']:.4f} bits per byte (step {written(best['step'], ',')})")
    fields += [f"{written(train['tokens_per_s'], ',.0f')} tokens/s", f"learning rate {written(train['lr'], '.2g')}"]
    return f"<div>{' · '.join(fields)}</div>"


def _bars(history, now):
    """Returns progress bars of the student, the plan and the session."""
    rows = []
    if "train" in history.last:
        train, plan = history.last["train"], history.last.get("plan")
        share = _share(train["step"], train["last_step"])
        rows.append(("this student", share, f"{share:.0%}"))
        done_s = sum(known(records[-1]["elapsed_s"] for records in history.trained.values()))
        share = 1.0 if history.last["any"]["kind"] == "verdict" else _share(done_s, done_s + number(train["left_s"]))
        text = f"{share:.0%}, {_format_seconds(train['left_s'])} left"
        if plan:
            needed = plan["sessions_needed"]
            text += f"; sessions in total: {needed}" if needed else "; sessions too short to finish"
            text += f"; done {plan['finish']} at the earliest"
        rows.append(("entire plan", share, text))
    start = history.last.get("start")
    if start and len(known([start["session_s"], start["session_left_s"]])) == 2:
        left_s = max(0.0, start["session_left_s"] - (now - history.started))
        text = f"{format_duration(left_s)} left of {format_duration(start['session_s'])}"
        rows.append(("this session", 1.0 - _share(left_s, start["session_s"]), text))
    cells = "<tr><td>{}</td><td><progress value='{:.4f}' max='1'></progress></td><td>{}</td></tr>"
    return f"<table>{''.join(cells.format(*row) for row in rows)}</table>"


def _share(part, total):
    """Returns a share in [0, 1], or 0 if unknown."""
    share = number(part) / (number(total) or math.nan)
    return 0.0 if math.isnan(share) else min(1.0, max(0.0, share))


def _format_seconds(seconds):
    return format_duration(seconds) if known([seconds]) else "unknown time"


def _alert(record):
    source = f"{NAMES.get(record['run'], record['run'])}, step {written(record['step'], ',')}"
    meaning, advice = html.escape(record["meaning"]), html.escape(record["advice"])
    return f"<div class='alert'><b>{html.escape(record['sign'])}</b> ({source}): {meaning}.<br>Try: {advice}.</div>"


def _hidden(alerts):
    count = len(alerts) - MAX_ALERTS
    return f"<div class='quiet'>and {count} earlier</div>" if count > 0 else ""
