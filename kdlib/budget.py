"""Time: reading durations, and a clock that tests replace."""

import re
import time

_UNITS = {"": 3600.0, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


def parse_duration(value):
    """Seconds in `11` (hours), `"11h"`, `"40m"`, `"90s"` or `"1h30m"`; ValueError for anything else."""
    text = str(value).strip().lower().replace(" ", "")
    if re.fullmatch(r"\d+(\.\d+)?", text):
        return float(text) * 3600.0
    parts = re.findall(r"(\d+(?:\.\d+)?)([smhd])", text)
    if not parts or "".join(number + unit for number, unit in parts) != text:
        raise ValueError(f"time {value!r} is not a duration; write hours as a number, or 11h, 40m, 90s, 1h30m")
    return sum(float(number) * _UNITS[unit] for number, unit in parts)


class Clock:
    """Seconds that never run backwards. Tests pass an object with the same `now`."""

    def now(self):
        return time.monotonic()


class Stopwatch:
    """Counts seconds of one activity over several stretches: `with watch: ...`; `watch.elapsed_s`."""

    def __init__(self, clock):
        self.clock = clock
        self.elapsed_s = 0.0

    def __enter__(self):
        self._start = self.clock.now()
        return self

    def __exit__(self, *_):
        self.elapsed_s += self.clock.now() - self._start


def spoken(seconds):
    """A duration for people: `8 s`, `3 min 20 s`, `2 h 05 min`."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds} s"
    if seconds < 3600:
        return f"{seconds // 60} min {seconds % 60:02d} s"
    return f"{seconds // 3600} h {seconds % 3600 // 60:02d} min"
