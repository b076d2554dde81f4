"""The panel of a run under way: what it is at, what it looks like, and buttons to pause it, save it, look at it.

    panel = dashboard.Panel()
    for record in distill(config, out, wishes=panel.wishes, on_progress=panel.progress):
        panel.show(record)
    panel.close()

It takes less than a hundredth of the time, and whatever goes wrong in it is no business of the run's. Where nobody sits in
front it writes a line of progress on stderr every minute and at `close` shows one plain figure.
"""

import contextlib
import html
import math
import warnings
from pathlib import Path

from kdlib import files, progress
from kdlib.clock import Clock, format_duration
from kdlib.report import terminal
from kdlib.report.live_figure import live_figure
from kdlib.report.style import NAMES, known, number, written

TEXT_SHARE, FIGURE_SHARE = 0.0015, 0.006
"""Of the time, what new text and new figures may take; what is left of a hundredth is for reading clicks."""
GUESSED_TEXT_S, EMPTY_FIGURES = 0.01, 2.5
"""What they take before that was measured: seconds for a text; for a figure so many times what an empty one takes."""
READ_EVERY_S = 0.2
MOST_RECORDS = 1500
"""Train records kept of one student; of longer runs every second, every fourth."""
MOST_ALERTS = 4
LINE_EVERY_S = 60.0
"""Seconds between two lines of progress where nobody sits in front."""
BUTTONS = {
    "pause": ("Pause and save", "pause", "Stop here with everything saved; the same cell goes on from there"),
    "save": ("Save now", "save", "Write a checkpoint and go on"),
    "evaluate": (
        "Evaluate now",
        "search",
        "Score the student on the validation text, for a look: nothing depends on it",
    ),
}
HOW_TO_STOP = "To pause, interrupt this cell (■): the run saves itself, and the same cell goes on from there."
LOOK = """<style>
.kdlib-panel { font-size: 13px; line-height: 1.5; max-width: 1040px; color: var(--jp-ui-font-color1, inherit); }
.kdlib-panel table { border-spacing: 0; } .kdlib-panel td { padding: 0 12px 0 0; white-space: nowrap; text-align: left; }
.kdlib-panel progress { width: 320px; height: 12px; accent-color: #0072B2; vertical-align: middle; }
.kdlib-panel .alert { border-left: 4px solid #D55E00; padding: 1px 8px; margin: 4px 0; }
.kdlib-panel .quiet { opacity: 0.75; }
.kdlib-figure { max-width: 1040px; width: 100%; }
body[data-jp-theme-light="false"] .kdlib-figure, body.vscode-dark .kdlib-figure {
  filter: invert(0.95) hue-rotate(180deg) brightness(1.3);
}
</style>"""
"""Pictures are drawn for a light page; in front of dark ones the page turns their lightness round and keeps their hues."""


class RenderBudget:
    """Time that may be spent: no more than a `share` of what has passed since it was opened."""

    def __init__(self, clock, share, guessed_s):
        self.clock, self.share, self.expected_s = clock, share, guessed_s
        self.opened, self.spent_s = clock.now(), 0.0

    def allows(self):
        """Whether one more, at the cost of the dearest of late, stays within the share."""
        return self.spent_s + self.expected_s <= self.share * (self.clock.now() - self.opened)

    @contextlib.contextmanager
    def spending(self):
        started = self.clock.now()
        try:
            yield
        finally:
            took = self.clock.now() - started
            self.spent_s += took
            self.expected_s = max(took, 0.9 * self.expected_s)


class Wishes(set):
    """Words that were clicked. Whoever looks for one has the clicks read first: between two steps, say, or two batches of an
    evaluation, when there is no record to show.
    """

    def __init__(self, read):
        super().__init__()
        self.read = read

    def __contains__(self, wish):
        self.read()
        return super().__contains__(wish)


class Panel:
    """Shows the records of `kdlib.distill` as they come, where somebody sits in front; `wishes` is for its `wishes`.

    `out`: the run folder, for what earlier sessions left there to be in the picture too. `problem` is what went wrong in the
    panel, `share` the part of the time that it took. The clock is a `clock.Clock`.
    """

    def __init__(self, out=None, clock=None, front_end=None):
        self.out, self.clock, self.wishes = out, clock or Clock(), Wishes(self._read_clicks)
        self.seen, self.problem, self.widgets, self.closed = History(), None, None, False
        self.front_end, self.read_at, empty_s = None, math.inf, 0.0
        with self._isolated():
            self.front_end = front_end or terminal.somebody()
            if self.front_end:
                self.widgets = Widgets(self.wishes, self.front_end.hears)
                empty_s = -self.clock.now()
                live_figure([]).png()
                empty_s += self.clock.now()
        self.lines = None if self.widgets else progress.Progress("loading", LINE_EVERY_S)
        self.opened, self.spent_s, self.read_at = self.clock.now(), 0.0, -math.inf
        self.text = RenderBudget(self.clock, TEXT_SHARE, GUESSED_TEXT_S)
        self.figure = RenderBudget(self.clock, FIGURE_SHARE, EMPTY_FIGURES * empty_s)
        self.drawn = 0

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    @property
    def share(self):
        """Of the time since it was opened, the part that it took."""
        return self.spent_s / max(self.clock.now() - self.opened, 1e-9)

    def show(self, record):
        """Take a record of any kind. Never raises; a broken panel still hears its buttons."""
        self._read_clicks()
        started = self.clock.now()
        if self.problem is None or not self.widgets:
            with self._isolated():
                self._see(record)
        self.spent_s += self.clock.now() - started

    def progress(self, phase, done, total):
        """Shows what is being done between two records, as `distill` says it to its `on_progress`. Never raises."""
        self._read_clicks()
        started = self.clock.now()
        with self._isolated():
            self.seen.phase = f"{phase}: {done:,} of {total:,}" if total else phase
            if self.lines:
                self.lines(phase, done, total)
            elif self.problem is None and self.text.allows():
                with self.text.spending():
                    self.widgets.show_text(self.seen, started)
        self.spent_s += self.clock.now() - started

    def close(self):
        """The last state; without a front end the figure: displayed in a notebook, given back elsewhere."""
        if self.closed:
            return None
        self.closed, made = True, None
        if self.lines:
            self.lines.close()
        if self.problem is None or not self.widgets:
            with self._isolated():
                made = self._last()
        if self.widgets:
            with self._isolated():
                self.widgets.end()
        if self.problem is not None:
            kind, text = type(self.problem).__name__, str(self.problem).strip().splitlines() or [""]
            warnings.warn(f"the panel stopped, the run did not: {kind}: {text[0][:200]}", stacklevel=2)
        return made

    def _read_clicks(self):
        """Five times a second at most."""
        started = self.clock.now()
        if self.widgets and not self.closed and started - self.read_at >= READ_EVERY_S:
            self.read_at = started
            with self._isolated():
                self.front_end.read()
                self.widgets.show_wishes(set(self.wishes))
            self.spent_s += self.clock.now() - started

    def _last(self):
        if self.widgets:
            self.widgets.show_text(self.seen, self.clock.now())
            if self.seen.trained:
                self.widgets.show_figure(live_figure(self.seen.all()).png())
        elif self.seen.trained:
            made = live_figure(self.seen.all())
            if terminal.kernel() is None:
                return made
            terminal.show(made.png())
        return None

    def _see(self, record):
        if record["kind"] == "start" and record.get("resumed") and self.out:
            for earlier in files.read_records(Path(self.out) / "records.jsonl"):
                self.seen.add(earlier, self.clock.now())
        self.seen.add(record, self.clock.now())
        if self.lines and record["kind"] == "train":
            name = f"{NAMES[record['run']]} {record['repeat'] + 1}"
            self.lines.train(name, record["step"] or 0, record["last_step"] or 0, f"{_spoken(record['left_s'])} left")
        if not self.widgets:
            return
        if self.text.allows():
            with self.text.spending():
                self.widgets.show_text(self.seen, self.clock.now())
        if self.seen.count > self.drawn and self.figure.allows():
            with self.figure.spending():
                self.widgets.show_figure(live_figure(self.seen.all()).png())
            self.drawn = self.seen.count

    @contextlib.contextmanager
    def _isolated(self):
        try:
            yield
        except Exception as problem:  # noqa: BLE001 - the run is worth more; told at close
            self.problem = self.problem or problem


class History:
    """What a panel keeps of a run's records: enough for a figure, however long the run is."""

    def __init__(self):
        self.trained, self.strides, self.scored, self.alerts, self.last = {}, {}, [], [], {}
        self.count, self.notice, self.at, self.phase = 0, "", 0.0, "loading"

    def all(self):
        return [*self.scored, *(record for rows in self.trained.values() for record in rows)]

    def add(self, record, now):
        """Note a record that came now."""
        kind = record["kind"]
        if kind == "train":
            self._add_trained(record)
        elif kind == "eval":
            self.scored.append(record)
            if record.get("asked") and not record.get("averaged"):
                bits = written(record["bits_per_byte"], ".4f")
                self.notice = f"step {written(record['step'], ',')}: {bits} bits per byte, for a look"
        elif kind == "alert":
            self.alerts.append(record)
        elif kind == "wish" and not record["answer"].startswith("evaluated"):
            self.notice = f"step {written(record['step'], ',')}: {record['answer']}"
        self.count += kind in ("train", "eval")
        self.last[kind], self.last["any"], self.phase = record, record, ""
        self.at = now if kind == "start" else self.at

    def _add_trained(self, record):
        arm = record["run"], record["repeat"]
        rows, stride = self.trained.setdefault(arm, []), self.strides.setdefault(arm, 1)
        if rows and (rows[-1]["step"] or 0) % stride:
            rows.pop()  # the newest one is always there
        rows.append(record)
        if len(rows) > MOST_RECORDS:
            self.strides[arm] = 2 * stride
            rows[:-1] = [r for r in rows[:-1] if (r["step"] or 0) % (2 * stride) == 0]


class Widgets:
    """What is on the page: text with bars, buttons, alerts, a picture."""

    def __init__(self, wishes, hears):
        import ipywidgets

        look, self.head, self.notice, self.alerts = (ipywidgets.HTML() for _ in range(4))
        look.value, self.head.value = LOOK, _box("Loading the models …")
        self.picture = ipywidgets.Image(format="png", layout=ipywidgets.Layout(display="none"))
        self.picture.add_class("kdlib-figure")
        self.buttons = {}
        for wish, (name, icon, means) in BUTTONS.items() if hears else ():
            button = ipywidgets.Button(description=name, icon=icon, tooltip=means, disabled=True)
            button.layout.width = "150px"
            button.on_click(lambda _, wish=wish: wishes.add(wish))
            self.buttons[wish] = button
        if not hears:
            self.notice.value = _box(HOW_TO_STOP)
        row = ipywidgets.HBox([*self.buttons.values(), self.notice])
        row.layout.align_items = "center"
        self.live = False
        terminal.show(ipywidgets.VBox([look, self.head, row, self.alerts, self.picture]))

    def show_wishes(self, wishes):
        """A button rests from its click until the wish is fulfilled, and while nothing is trained."""
        for wish, button in self.buttons.items():
            resting = not self.live or wish in wishes
            if button.disabled != resting:
                button.disabled = resting

    def show_text(self, seen, now):
        self.live = "train" in seen.last
        self._set(self.head, _box(_headline(seen) + _bars(seen, now)))
        self._set(self.alerts, _box("".join(map(_alert, reversed(seen.alerts[-MOST_ALERTS:]))) + _more(seen.alerts)))
        if self.buttons:
            self._set(self.notice, _box(f"<span class='quiet'>{html.escape(seen.notice)}</span>"))

    def show_figure(self, picture):
        self.picture.value = picture
        self.picture.layout.display = None

    def end(self):
        for button in self.buttons.values():
            button.disabled = True

    def _set(self, widget, text):
        if widget.value != text:
            widget.value = text


def _box(inside):
    return f"<div class='kdlib-panel'>{inside}</div>"


def _headline(seen):
    """What it is at, in one line, and the phase under way below it."""
    phase = f"<div class='quiet'>{html.escape(seen.phase)} …</div>" if seen.phase else ""
    return (_state(seen) if seen.last else "") + phase


def _state(seen):
    end = seen.last["any"]
    if end["kind"] == "verdict":
        return f"<div><b>Done.</b> {html.escape(end['sentence'])}</div>"
    if end["kind"] == "paused":
        return f"<div><b>Paused:</b> {html.escape(end['reason'])}. The same cell goes on with it.</div>"
    if end["kind"] == "reading":
        return f"<div>{html.escape(end['told'])}</div>"
    if "train" not in seen.last:
        return "<div>The models are there; scoring them before anything is learned …</div>"
    now = seen.last["train"]
    loss = f"{now['loss']:.3f} nats" if known([now["loss"]]) and not now["skipped"] else "no number"
    at, last = (written(now[name], ",") for name in ("step", "last_step"))
    told = [f"<b>{NAMES[now['run']]}</b>", f"step {at} of {last}", f"loss {loss}"]
    scored = [
        r for r in seen.scored if (r["run"], r["repeat"], r["split"]) == (now["run"], now["repeat"], "validation")
    ]
    scored = [r for r in scored if not r.get("asked")]
    scored = [r for r in scored if known([r["bits_per_byte"]])]
    if scored:
        best = min(scored, key=lambda r: r["bits_per_byte"])
        told.append(f"best {best['bits_per_byte']:.4f} bits per byte (step {written(best['step'], ',')})")
    told += [f"{written(now['tokens_per_s'], ',.0f')} tokens/s", f"learning rate {written(now['lr'], '.2g')}"]
    return f"<div>{' · '.join(told)}</div>"


def _bars(seen, now):
    """How far the student, the whole run and the session are."""
    rows = []
    if "train" in seen.last:
        newest, plan = seen.last["train"], seen.last.get("plan")
        part = _share(newest["step"], newest["last_step"])
        rows.append(("this student", part, f"{part:.0%}"))
        done = sum(known(rows[-1]["elapsed_s"] for rows in seen.trained.values()))
        whole = 1.0 if seen.last["any"]["kind"] == "verdict" else _share(done, done + number(newest["left_s"]))
        told = f"{whole:.0%}, {_spoken(newest['left_s'])} left"
        if plan:
            sessions = plan["sessions_needed"] or "none would be enough"
            told += f"; sessions in all: {sessions}; done {plan['finish']} at the earliest"
        rows.append(("whole plan", whole, told))
    start = seen.last.get("start")
    if start and len(known([start["session_s"], start["session_left_s"]])) == 2:
        left = max(0.0, start["session_left_s"] - (now - seen.at))
        told = f"{format_duration(left)} left of {format_duration(start['session_s'])}"
        rows.append(("this session", 1.0 - _share(left, start["session_s"]), told))
    cells = "<tr><td>{}</td><td><progress value='{:.4f}' max='1'></progress></td><td>{}</td></tr>"
    return f"<table>{''.join(cells.format(*row) for row in rows)}</table>"


def _share(part, whole):
    """A share in [0, 1]; 0 where it is not known."""
    share = number(part) / (number(whole) or math.nan)
    return 0.0 if math.isnan(share) else min(1.0, max(0.0, share))


def _spoken(seconds):
    return format_duration(seconds) if known([seconds]) else "unknown time"


def _alert(record):
    where = f"{NAMES.get(record['run'], record['run'])}, step {written(record['step'], ',')}"
    what, advice = html.escape(record["meaning"]), html.escape(record["advice"])
    return f"<div class='alert'><b>{html.escape(record['sign'])}</b> ({where}): {what}.<br>Try: {advice}.</div>"


def _more(alerts):
    hidden = len(alerts) - MOST_ALERTS
    return f"<div class='quiet'>and {hidden} before</div>" if hidden > 0 else ""
