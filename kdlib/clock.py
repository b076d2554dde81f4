"""A monotonic clock that tests can replace, and conversion of durations to and from text."""

import math
import re
import time


class Clock:
    """Monotonic clock in seconds. Tests pass an object with the same method."""

    def now(self):
        return time.monotonic()


def date(seconds_from_now=0.0):
    """Formats the local date and time that is `seconds_from_now` ahead."""
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(time.time() + seconds_from_now))


def today():
    """Returns the local date, as `2026-07-26`."""
    return time.strftime("%Y-%m-%d")


def format_duration(seconds):
    """Formats a duration: `8 s`, `3 min 20 s`, `2 h 05 min`; `unknown time` for null, NaN and infinity."""
    if seconds is None or not math.isfinite(seconds):
        return "unknown time"
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds} s"
    if seconds < 3600:
        return f"{seconds // 60} min {seconds % 60:02d} s"
    return f"{seconds // 3600} h {seconds % 3600 // 60:02d} min"


def parse_duration(duration):
    """Parses `"11h"`, `"1h30m"`, `"90s"` or hours to seconds, `""` to infinity. Raises ValueError for other text."""
    if duration == "":
        return math.inf
    match = re.fullmatch(r"\s*(?:([\d.]+)\s*h)?\s*(?:([\d.]+)\s*m(?:in)?)?\s*(?:([\d.]+)\s*s)?\s*", str(duration))
    try:
        if match and any(match.groups()):
            hours, minutes, seconds = (float(number or 0.0) for number in match.groups())
        else:
            hours, minutes, seconds = float(duration), 0.0, 0.0
        total = 3600.0 * hours + 60.0 * minutes + seconds
    except ValueError:
        total = math.nan
    if not 0.0 < total < math.inf:
        raise ValueError(f"time_budget takes hours or a duration like 11h, 40m, 1h30m or 90s; got {duration!r}")
    return total
