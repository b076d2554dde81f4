"""Verdict -> figures of what a run came to."""

from kdlib.style import COLOURS, NAMES, THEMES, figure


def gain(verdict, theme="light"):
    """Bits per byte saved against the control: the interval, the mean, every run."""
    with figure(theme, height=1.9) as (made, axes):
        ink = THEMES[theme]["text"]
        axes.axvline(0, color=ink, lw=1)
        if verdict["gain"] is not None:
            low, high = verdict["interval"]
            colour = {True: COLOURS["teacher"], False: COLOURS["distilled"], None: "#999999"}[verdict["helped"]]
            axes.plot([low, high], [0, 0], color=colour, lw=7, solid_capstyle="butt", alpha=0.55, label="95 % interval")
            axes.plot(verdict["gain"], 0, "o", color=colour, ms=10, label="mean")
            if len(verdict["gain_by_run"]) > 1:
                axes.plot(
                    verdict["gain_by_run"], [0] * len(verdict["gain_by_run"]), "|", color=ink, ms=16, label="runs"
                )
            edge = 1.25 * max(abs(low), abs(high), 1e-6)
            axes.set_xlim(-edge, edge)
            axes.legend(frameon=False, labelcolor=ink, ncols=3, loc="upper left", bbox_to_anchor=(0, 1.32))
        axes.set_yticks([])
        axes.set_xlabel("bits per byte saved against plain training  (left of 0: worse, right: better)")
        axes.grid(axis="y", visible=False)
    return made


def bits_per_byte(verdict, theme="light"):
    """Bits per byte of the four models on the test text, as bars with their numbers."""
    shown = [(n, verdict["bits_per_byte"][n]) for n in ("student_before", "ce_only", "distilled", "teacher")]
    shown = [(name, value) for name, value in shown if value is not None]
    with figure(theme, height=2.2) as (made, axes):
        for place, (name, value) in enumerate(reversed(shown)):
            axes.barh(place, value, color=COLOURS[name], height=0.66)
            axes.text(value, place, f" {value:.3f}", va="center", color=THEMES[theme]["text"])
        axes.set_yticks(range(len(shown)), [NAMES[name] for name, _ in reversed(shown)])
        axes.set_xlim(0, 1.12 * max(value for _, value in shown))
        axes.set_xlabel("bits per byte, test text (lower is better)")
        axes.grid(axis="y", visible=False)
    return made
