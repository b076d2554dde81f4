"""Requests of the caller during a run (`wishes`): words in a set, added at any time, from any thread."""

PAUSE, SAVE, EVALUATE = KNOWN = ("pause", "save", "evaluate")


class UnknownWish(ValueError):
    """A word in `wishes` other than `KNOWN`."""


class Wishes:
    """View of the caller's set of wishes."""

    def __init__(self, words):
        self.words = set() if words is None else words
        self.check_words()

    def __contains__(self, wish):
        return wish in self.words

    def flags(self):
        """Returns whether the set has each wish of `KNOWN`, in order, and whether it has an unknown word."""
        return *(wish in self.words for wish in KNOWN), bool(self._unknown())

    def fulfil(self, experiment, schedule, arm, save, evaluate, lacks_time):
        """Saves and evaluates as requested, unless an evaluation is due. Yields `(records, wish, answer)`."""
        if save and experiment.evaluations_done(arm):
            name = schedule.flush()
            yield [], SAVE, f"saved as {name}" if name else "not saved: the weights contain NaN or infinity"
        if evaluate and experiment.evaluations_done(arm):
            problem = "this step was already evaluated" if arm.evaluated == arm.step else ""
            problem = "no time is left for an evaluation in this session" if lacks_time else problem
            records = [] if problem else experiment.evaluate_on_request(arm)
            yield records, EVALUATE, problem or "evaluated on request"

    def discard(self, wish):
        self.words.discard(wish)

    def check_words(self):
        """Raises `UnknownWish` if the set has an unknown word."""
        if unknown := self._unknown():
            raise UnknownWish(f"unknown wish {', '.join(unknown)}; have {', '.join(KNOWN)}")

    def _unknown(self):
        return sorted(map(repr, set(self.words) - set(KNOWN)))
