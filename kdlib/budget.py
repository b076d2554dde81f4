"""Time: a clock that tests replace, and durations for people."""

import time


class Clock:
    """Seconds that never run backwards. Tests pass an object with the same `now`."""

    def now(self):
        return time.monotonic()


def spoken(seconds):
    """A duration for people: `8 s`, `3 min 20 s`, `2 h 05 min`."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds} s"
    if seconds < 3600:
        return f"{seconds // 60} min {seconds % 60:02d} s"
    return f"{seconds // 3600} h {seconds % 3600 // 60:02d} min"
