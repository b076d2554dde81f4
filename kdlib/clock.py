"""A clock that tests replace, and durations for people."""

import math
import re
import time


class Clock:
    """Seconds that never run backwards, whatever is done to the machine's date. Tests pass an object with the same `now`."""

    def now(self):
        return time.monotonic()


def date(seconds_from_now=0.0):
    """The date and time of day in so many seconds, by the machine's own clock and zone: for people only."""
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(time.time() + seconds_from_now))


def format_duration(seconds):
    """A duration for people: `8 s`, `3 min 20 s`, `2 h 05 min`."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds} s"
    if seconds < 3600:
        return f"{seconds // 60} min {seconds % 60:02d} s"
    return f"{seconds // 3600} h {seconds % 3600 // 60:02d} min"


def parse_duration(duration):
    """Seconds of `"11h"`, `"40m"`, `"90s"`, `"1h30m"` or a number of hours; infinity for an empty text. ValueError for
    anything else.
    """
    if duration == "":
        return math.inf
    units = re.fullmatch(r"\s*(?:([\d.]+)\s*h)?\s*(?:([\d.]+)\s*m(?:in)?)?\s*(?:([\d.]+)\s*s)?\s*", str(duration))
    try:
        if units and any(units.groups()):
            hours, minutes, seconds = (float(part or 0.0) for part in units.groups())
        else:
            hours, minutes, seconds = float(duration), 0.0, 0.0
        total = 3600.0 * hours + 60.0 * minutes + seconds
    except ValueError:
        total = math.nan
    if not 0.0 < total < math.inf:
        raise ValueError(f"time_budget takes hours or a duration like 11h, 40m, 1h30m or 90s; got {duration!r}")
    return total
