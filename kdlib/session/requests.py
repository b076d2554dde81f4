"""What the caller of a run may wish for while it is under way: words in a set, put there at any time, from any thread."""

PAUSE, SAVE, EVALUATE = KNOWN = ("pause", "save", "evaluate")


class Unknown(ValueError):
    """A word that means nothing."""


class Wishes:
    """Reads the caller's set, and takes out what was fulfilled."""

    def __init__(self, words):
        self.words = set() if words is None else words
        self.refuse_unknown()

    def __contains__(self, wish):
        return wish in self.words

    def all(self):
        """Whether there is each wish of `KNOWN`, and at last whether there is an unknown one."""
        return *(wish in self.words for wish in KNOWN), bool(self._unknown())

    def grant(self, experiment, saving, arm, save, look, in_vain):
        """Save and look, as is wished for, where nothing is half-done: yields `(records, wish, answer)`. `in_vain`: no time
        is left for a look.
        """
        if save and experiment.evaluations_done(arm):
            name = saving.flush()
            yield [], SAVE, f"saved as {name}" if name else "not saved: the weights are no numbers"
        if look and experiment.evaluations_done(arm):
            told = "it was evaluated at this very step" if arm.evaluated == arm.step else ""
            told = "no time is left for it in this session" if in_vain else told
            yield [] if told else experiment.look(arm), EVALUATE, told or "evaluated for a look"

    def fulfil(self, wish):
        self.words.discard(wish)

    def refuse_unknown(self):
        """Raise Unknown where there is a word that means nothing."""
        if unknown := self._unknown():
            raise Unknown(f"unknown wish {', '.join(unknown)}; have {', '.join(KNOWN)}")

    def _unknown(self):
        return sorted(map(repr, set(self.words) - set(KNOWN)))
