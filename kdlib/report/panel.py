"""Live notebook panel of a run: progress, alerts and a figure.

    panel = kdlib.LivePanel()
    for record in distill(config, out, on_progress=panel.progress):
        panel.update(record)
    panel.close()

It uses less than 1 % of the time, and its errors never stop the run. Without an interactive front end, it writes a line of
progress to stderr every minute, and shows one figure at `close`.
"""

import contextlib
import math
import sys
import warnings
from pathlib import Path

from kdlib import environment, files, progress
from kdlib.clock import Clock, format_duration
from kdlib.report import figures
from kdlib.report.figures import COLOURS, GIB, NAMES, PALETTE, TERM_COLOURS, TERMS, known, number, numbers, select
from kdlib.report.html import TEMPLATES

TEXT_SHARE, FIGURE_SHARE = 0.0015, 0.006
"""Maximum shares of the time for text and figures."""
INITIAL_TEXT_S, INITIAL_FIGURE_FACTOR = 0.01, 2.5
"""Initial cost estimates: seconds of a text update, and cost of a figure as a multiple of an empty one's."""
MAX_RECORDS = 1500
"""Train records kept per student. Longer runs keep every second, then every fourth."""
MAX_POINTS = 400
"""Points per line of the figure: more are not visible and take time to draw."""
MAX_ALERTS = 4
LINE_EVERY_S = 60.0
"""Seconds between two lines of progress without an interactive front end."""
HOW_TO_STOP = "To pause, interrupt this cell (■): the run saves a checkpoint. Run the cell again to resume."
MARGINS = {"left": 0.045, "right": 0.985, "top": 0.88, "bottom": 0.075, "wspace": 0.18, "hspace": 0.5}
TEXTS = TEMPLATES.get_template("panel.html.j2").module


class RenderBudget:
    """Limit on rendering time: a `share` of the time since the start."""

    def __init__(self, clock, share, expected_s):
        self.clock, self.share, self.expected_s = clock, share, expected_s
        self.opened, self.spent_s = clock.now(), 0.0

    def render(self, action, *args):
        """Calls `action`, if this stays within the share at the recent maximum cost. Returns whether it did."""
        started = self.clock.now()
        if self.spent_s + self.expected_s > self.share * (started - self.opened):
            return False
        try:
            action(*args)
        finally:
            duration_s = self.clock.now() - started
            self.spent_s += duration_s
            self.expected_s = max(duration_s, 0.9 * self.expected_s)
        return True


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


class LivePanel(contextlib.AbstractContextManager):
    """Live display of the records of `kdlib.distill`. Pass `progress` to its `on_progress`.

    `out`: the run folder, to include earlier sessions. `clock`: a `clock.Clock`. `problem` is the first exception in the
    panel, or None.
    """

    def __init__(self, out=None, clock=None):
        self.out, self.clock, self.num_drawn = out, clock or Clock(), 0
        self.history, self.problem, self.widgets, self.closed = History(), None, None, False
        empty_s = self._isolate(self._open_widgets) or 0.0
        self.lines = None if self.widgets else progress.Progress("loading", LINE_EVERY_S)
        self.text = RenderBudget(self.clock, TEXT_SHARE, INITIAL_TEXT_S)
        self.figure = RenderBudget(self.clock, FIGURE_SHARE, INITIAL_FIGURE_FACTOR * empty_s)

    def __exit__(self, *_):
        self.close()

    def update(self, record):
        """Shows a record of any kind. Never raises."""
        self._isolate(self._show_record, record)

    def progress(self, phase, done, total):
        """Shows the phase between two records, as the `on_progress` of `distill`. Never raises."""
        self._isolate(self._show_phase, phase, done, total)

    def close(self):
        """Shows the final state. Without a front end, displays the figure in a notebook, or returns it elsewhere."""
        if self.closed:
            return None
        self.closed = True
        if self.lines:
            self.lines.close()
        figure = self._isolate(self._show_last)
        if self.problem is not None:
            kind, text = type(self.problem).__name__, str(self.problem).strip().splitlines() or [""]
            warnings.warn(f"the panel stopped, the run did not: {kind}: {text[0][:200]}", stacklevel=2)
        return figure

    def _isolate(self, action, *args):
        """Returns `action(*args)`, or None after an error: it stops the widgets, but neither the run nor the lines."""
        try:
            return action(*args) if self.problem is None or not self.widgets else None
        except Exception as problem:  # noqa: BLE001 - must not stop the run; `close` warns
            self.problem = self.problem or problem

    def _open_widgets(self):
        """Shows widgets in an interactive front end. Returns the seconds that an empty figure takes, or None."""
        if has_front_end():
            self.widgets, started = Widgets(), self.clock.now()
            live_figure([]).png()
            return self.clock.now() - started
        return None

    def _show_phase(self, phase, done, total):
        self.history.phase = f"{phase}: {done:,} of {total:,}" if total else phase
        if self.lines:
            self.lines(phase, done, total)
        else:
            self.text.render(self._show_text)

    def _show_record(self, record):
        if record["kind"] == "start" and record.get("resumed") and self.out:
            for earlier_record in files.read_records(Path(self.out) / "records.jsonl"):
                self.history.add(earlier_record, self.clock.now())
        self.history.add(record, self.clock.now())
        if self.lines and record["kind"] == "train":
            name, left = f"{NAMES[record['run']]} {record['repeat'] + 1}", format_duration(record["left_s"])
            self.lines.train(name, record["step"] or 0, record["last_step"] or 0, f"{left} left")
        if self.widgets:
            self.text.render(self._show_text)
            if self.history.count > self.num_drawn and self.figure.render(self._show_figure):
                self.num_drawn = self.history.count

    def _show_last(self):
        if self.widgets:
            self._show_text()
        if not self.history.trained:
            return None
        if not self.widgets and kernel() is None:
            return live_figure(self.history.all())
        return self._show_figure()

    def _show_text(self):
        self.widgets.show_text(self.history, self.clock.now())

    def _show_figure(self):
        (self.widgets.show_figure if self.widgets else show)(live_figure(self.history.all()).png())


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

    def best(self):
        """Returns the best validation record of the student in training, or None."""
        train = self.last.get("train", {})
        key = train.get("run"), train.get("repeat"), "validation"
        scored = [r for r in self.scored if (r["run"], r["repeat"], r["split"]) == key]
        return min((r for r in scored if known([r["bits_per_byte"]])), key=lambda r: r["bits_per_byte"], default=None)

    def shares(self):
        """Returns the completed shares of the current student and of the plan."""
        train, is_complete = self.last["train"], self.last["any"]["kind"] == "verdict"
        done_s = sum(known(records[-1]["elapsed_s"] for records in self.trained.values()))
        of_plan = 1.0 if is_complete else _share(done_s, done_s + number(train["left_s"]))
        return _share(train["step"], train["last_step"]), of_plan

    def session(self, now):
        """Returns the completed share of the session and its seconds left, or None without a time limit."""
        start = self.last.get("start")
        if start is None or len(known([start["session_s"], start["session_left_s"]])) < 2:
            return None
        left_s = max(0.0, start["session_left_s"] - (now - self.started))
        return 1.0 - _share(left_s, start["session_s"]), left_s


def _share(part, total):
    """Returns a share in [0, 1], or 0 if unknown."""
    share = number(part) / (number(total) or math.nan)
    return 0.0 if math.isnan(share) else min(1.0, max(0.0, share))


class Widgets:
    """Widgets of the panel: status with progress bars, alerts, and a figure."""

    def __init__(self):
        import ipywidgets

        style, self.head, notice, self.alerts = (ipywidgets.HTML() for _ in range(4))
        style.value, notice.value = TEXTS.style(), TEXTS.notice(HOW_TO_STOP)
        self.head.value = TEXTS.notice("Loading the models …")
        self.picture = ipywidgets.Image(format="png", layout=ipywidgets.Layout(display="none"))
        self.picture.add_class("kdlib-figure")
        show(ipywidgets.VBox([style, self.head, notice, self.alerts, self.picture]))

    def show_text(self, history, now):
        self.head.value = TEXTS.status(history, now)
        self.alerts.value = TEXTS.alerts(history.alerts, MAX_ALERTS)

    def show_figure(self, picture):
        self.picture.value = picture
        self.picture.layout.display = None


@figures.figure(6.4, 2, 3, 13.0, 80, MARGINS, {"font.size": 9, "legend.fontsize": 9, "lines.linewidth": 1.6})
def live_figure(axes, records):
    """Plots loss terms, their shares of loss and gradient, learning curves, memory and learning rate.

    `records`: all or some of a run's records. An empty panel says when its data will exist.
    """
    (loss, shares, gradient), (curves, memory, rate) = axes
    trained = select(records, "train")
    rows = [r for r in trained if r["run"] == "distilled"]
    rows = [r for r in rows if r["repeat"] == rows[-1]["repeat"]]
    _plot_loss(loss, shares, _thin([r for r in rows if r["loss"] is not None and not r["skipped"]]))
    _plot_gradient(gradient, _thin([r for r in rows if r["grad_shares"]]))
    _plot_evaluations(curves, select(records, "eval", **figures.VALIDATION))
    _plot_memory(memory, trained)
    _plot_learning_rate(rate, rows, [r for r in trained if r["run"] == "ce_only"])
    names = [name for name in TERMS if any(name in r["shares"] for r in rows)]
    patches = [loss.fill_between([], [], color=TERM_COLOURS[name], label=TERMS[name]) for name in names]
    loss.figure.legend(handles=patches, ncols=len(TERMS), loc="upper left", bbox_to_anchor=(0.04, 1.0))


def _plot_loss(above, below, rows):
    if len(rows) > 1:
        nats = figures.stack_loss_terms(above, below, rows)
        totals = sorted(known(map(sum, zip(*nats, strict=True)))) or [0.0]
        above.set_ylim(0, max(1.15 * totals[int(0.98 * (len(totals) - 1))], 1e-6))  # ignores outliers
        above.set_xlim(rows[0]["step"], rows[-1]["step"])
        below.set_xlim(rows[0]["step"], rows[-1]["step"])
    below.set_ylim(0, 100)
    empty = "" if len(rows) > 1 else "after two steps"
    _label(above, "Loss of the distilled student", "optimizer step", "weighted parts (nats)", empty)
    _label(below, "Share of the loss", "optimizer step", "share (%)", empty)


def _plot_gradient(axes, rows):
    figures.plot_gradient_shares(axes, rows, ms=2.5, marker="o" if len(rows) < 50 else "")
    axes.set_ylim(0, 100)
    if rows:
        _from_zero(axes, [r["step"] for r in rows])
    _label(axes, "Share of the gradient norm", "optimizer step", "share (%)", "" if rows else "not measured yet")


def _plot_evaluations(axes, points):
    labels = {(run, False): name for run, name in NAMES.items()}
    unit, seconds = figures.plot_scores(axes, points, labels, ms=3.5, alpha=0.9)
    _from_zero(axes, [r["elapsed_s"] / seconds for r in points])
    dotted = "; dotted: averaged" if any(r.get("averaged") for r in points) else ""
    empty = "" if any(r["run"] != "teacher" for r in points) else "after the first evaluation"
    title = f"Validation text (lower is better{dotted})"
    _label(axes, title, f"training time ({unit})", "bits per byte", empty, has_legend=True)


def _plot_memory(axes, trained):
    timed = zip(figures.total_times(trained), trained, strict=True)
    timed = _thin([(time, r["memory"]) for time, r in timed if known([r["memory"]["used_bytes"]])])
    unit, seconds = figures.time_unit([time for time, _ in timed])
    if timed:
        last = {name: size / GIB for name, size in timed[-1][1].items() if known([size])}
        xs = [time / seconds for time, _ in timed]
        used = [sizes["used_bytes"] / GIB for _, sizes in timed]
        axes.plot(xs, used, color=PALETTE[0], lw=1.8, label=f"used {used[-1]:.1f}")
        if last.get("predicted_bytes"):
            predicted = numbers((sizes.get("predicted_bytes") for _, sizes in timed), 1 / GIB)
            label = f"predicted peak {last['predicted_bytes']:.1f}"
            axes.plot(xs, predicted, "--", color=PALETTE[5], lw=1.4, label=label)
        if "total_bytes" in last:
            axes.axhline(last["total_bytes"], ls=":", lw=1.4, label=f"total {last['total_bytes']:.1f}")
        axes.set_ylim(0, 1.08 * max(last.values()))
        _from_zero(axes, xs)
    xlabel, empty = f"training time of all students ({unit})", "" if timed else "after the first step"
    _label(axes, "Memory", xlabel, "GiB", empty, has_legend=True)


def _plot_learning_rate(axes, distilled, control):
    for run, rows in (("ce_only", _thin(control)), ("distilled", _thin(distilled))):
        if rows:
            rates = numbers((r["lr"] for r in rows), 1000)
            axes.plot([r["step"] for r in rows], rates, color=COLOURS[run], label=NAMES[run])
    axes.set_ylim(bottom=0)
    _from_zero(axes, [r["step"] for r in distilled + control])
    empty = "" if distilled or control else "after the first step"
    _label(axes, "Learning rate", "optimizer step", "rate (1e-3)", empty, has_legend=True)


def _label(axes, title, xlabel, ylabel, empty="", has_legend=False):
    """Sets title and labels at fixed positions, because matplotlib's layout is slow. `empty`: a text in empty axes."""
    axes.set(xlabel=xlabel, ylabel=ylabel)
    axes.xaxis.set_label_coords(0.5, -0.12)
    axes.yaxis.set_label_coords(-0.095, 0.5)
    axes.locator_params(nbins=5)
    axes.set_title(title, loc="left", y=1.0, pad=20 if has_legend and not empty else None)
    if empty:
        axes.text(0.5, 0.5, empty, transform=axes.transAxes, ha="center", va="center", alpha=0.6)
        axes.set(xticks=[], yticks=[])
    elif has_legend:
        place = {"loc": "lower left", "bbox_to_anchor": (-0.02, 0.97), "borderaxespad": 0.3}
        axes.legend(ncols=5, handlelength=1.3, columnspacing=1.0, **place)


def _from_zero(axes, xs):
    axes.set_xlim(0, 1.03 * max(xs, default=0.0) or 1.0)
    for line in axes.get_lines():
        if len(line.get_xdata()) == 1:  # a single point has no line
            line.set_marker("o")


def _thin(rows):
    """Returns at most `MAX_POINTS` evenly spaced rows, including the last one."""
    stride = math.ceil(len(rows) / MAX_POINTS) or 1
    return rows[(len(rows) - 1) % stride :: stride]
