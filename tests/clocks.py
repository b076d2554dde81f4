"""Clocks that tests move, so that nothing depends on how busy the machine is."""

import threading


class Ticks:
    """Every look from the main thread is `step_s` later than the one before; other threads see no time pass."""

    def __init__(self, step_s=0.01):
        self.time, self.step_s = 0.0, step_s

    def now(self):
        if threading.current_thread() is threading.main_thread():
            self.time += self.step_s
        return self.time
