"""Push a run and keep pushing its next sessions until it is complete.

    python kaggle/relay.py --owner NAME --param teacher=... --param student=... --param dataset=... --out relay
        [--sessions 6] [--until 2026-12-24] [--budget-hours 30] [--follow]

Each session mounts what the one before left and goes on from there. All that is known lies in `relay.json` in `--out`:
killed and started again with the same options, the relay goes on and never pushes a session twice. A session that leaves
nothing (an error, a cancel, Kaggle's own limit) is lost; the next one goes on from the last that ended well. Exit status: 0
the run is complete, or paused with the relay's limits reached; 1 it failed, or Kaggle said no; 2 bad input.
"""

import contextlib
import datetime
import fcntl
import json
import os
import secrets
import sys
import threading
import time
from pathlib import Path

import kernel
from client import RUNNING, Busy, Client, Refused, Unreachable, busy_kind, main_of
from pull import pull
from push import checked, parser, prepared

from kdlib import files
from kdlib.clock import format_duration, parse_duration

LOSSES = 3
"""Sessions in a row that leave nothing, after which something is wrong."""
SMALL = r"checkpoints/|student/|figures/|\.safetensors$"
"""Outputs of a session that the relay can do without until the end."""
BUSY_S = {"sessions": 600.0, "quota": 3600.0}
"""Seconds to the next try where Kaggle has no room."""
LEAST_S = 600.0
"""A session shorter than this is not worth its start."""
LOG_TAIL = 30


class Relay:
    """One run over many sessions. `client` is a `Client`, `options` those of the command line."""

    def __init__(self, client, options, clock=time, poll_s=(30.0, 300.0)):
        self.client, self.options, self.clock, self.poll_s = client, options, clock, poll_s
        self.out = Path(options.out)
        self.path = self.out / "relay.json"
        self.ref = checked(options)[1]["id"]
        asked = {"kernel": self.ref, "notebook": Path(options.notebook).name, "parameters": sorted(options.param)}
        self.state = self._found(asked) or {**asked, "sessions": []}

    def _found(self, asked):
        """What an earlier relay left in the folder; ValueError where that was about something else."""
        if not self.path.exists():
            if self.out.exists() and any(each.name != ".lock" for each in self.out.iterdir()):
                raise ValueError(f"--out {self.out} holds other files; give a new folder")
            return None
        state = files.read_json(self.path)
        differing = [name for name, value in asked.items() if state.get(name) != value]
        if differing:
            was = "; ".join(f"{name} was {state.get(name)!r}" for name in differing)
            raise ValueError(
                f"--out {self.out} holds a relay of something else: {was}. Give a new folder, or the same options"
            )
        return state

    def run(self):
        """All sessions that are still needed; the exit status."""
        answer = None
        while answer is None:
            try:
                answer = self._go_on()
            except Unreachable as problem:  # all that is known is on the disk: the next try begins there
                self.client.say(f"{problem}. Next try in {format_duration(self.poll_s[1])}.")
                self.clock.sleep(self.poll_s[1])
        return answer

    def _go_on(self):
        """The next thing that is to be done; the exit status where that was the last."""
        last = self.state["sessions"][-1] if self.state["sessions"] else None
        if last is None or last["phase"] == "done":
            answer = self._answer(last)
            if answer is not None:
                return answer
            last = self._begin()
        if last["phase"] == "pushing" and not self._push(last):
            return 0
        if last["phase"] == "running":
            self._wait_for(last)
        return None

    def _answer(self, last):
        """The exit status where nothing more is to be pushed; None where another session is."""
        sessions = self.state["sessions"]
        if last and last["state"] == "complete":
            return self._finish(last)
        if last and last["state"] == "failed":
            self.client.say(
                f"The run failed: {last['reason']}. Outputs of session {len(sessions)}: {self._folder(last)}"
            )
            return 1
        lost = [each["state"] == "lost" for each in sessions[-LOSSES:]]
        if len(lost) == LOSSES and all(lost):
            self.client.say(f"{LOSSES} sessions in a row left nothing; the last: {last['reason']}. Look at its log.")
            return 1
        places = [(each.get("step"), each.get("read")) for each in sessions[-LOSSES:] if each["state"] == "paused"]
        if len(places) == LOSSES and len(set(places)) == 1:
            self.client.say(f"{LOSSES} sessions in a row did not get beyond step {places[0][0]}: {last['reason']}")
            return 1
        limit = self._limit()
        if limit:
            self.client.say(
                f"Paused after {len(sessions)} sessions: {limit}. The same command with a higher limit goes on."
            )
            return 0
        return None

    def _limit(self):
        """Which of the relay's limits is reached; empty where none is."""
        if self.options.sessions and len(self.state["sessions"]) >= self.options.sessions:
            return f"--sessions {self.options.sessions} are used"
        if self._until_s() < LEAST_S * self._scale():
            return f"--until {self.options.until} is reached"
        if self._hours_left_s() < LEAST_S * self._scale():
            return f"--budget-hours {self.options.budget_hours} are used"
        return ""

    def _scale(self):
        """Below 1 where sessions are shorter than usual: what is worth a start is less, too."""
        whole = parse_duration(self.options.timeout) if self.options.timeout else kernel.SESSION_S
        return min(1.0, whole / kernel.SESSION_S)

    def _until_s(self):
        if not self.options.until:
            return float("inf")
        return _moment(self.options.until) - self.clock.time()

    def _hours_left_s(self):
        if not self.options.budget_hours:
            return float("inf")
        return 3600.0 * self.options.budget_hours - sum(each.get("session_s", 0.0) for each in self.state["sessions"])

    def _begin(self):
        """A session that is to be pushed, on the disk before anything of it leaves."""
        last = {"token": secrets.token_hex(8), "phase": "pushing", "begun": self.clock.time()}
        self.state["sessions"].append(last)
        self._save()
        return last

    def _push(self, last):
        """Have Kaggle run the session, waiting where it has no room. False where a limit is reached meanwhile."""
        number, left = len(self.state["sessions"]), any(each.get("version_left") for each in self.state["sessions"])
        whole = kernel.SESSION_S if not self.options.timeout else parse_duration(self.options.timeout)
        usable = min(self._hours_left_s(), self._until_s())
        within = usable if usable < whole else None
        notebook, metadata, timeout_s = prepared(self.options, last["token"], [self.ref] if left else [], within)
        folder = self.out / "kernel"
        kernel.write(folder, notebook, metadata)
        while True:
            made = self.client.find(self.ref, last["token"])  # pushed before we were killed
            try:
                made = made or self.client.push(folder, last["token"], timeout_s)
                break
            except Busy as busy:
                if not self._sleep_busy(busy):
                    self.state["sessions"].pop()
                    self._save()
                    return False
        last.update(phase="running", version=made.version, pushed=self.clock.time())
        self._save()
        self.client.say(f"Session {number}: version {made.version} was pushed; {made.url}")
        return True

    def _sleep_busy(self, busy):
        wait_s = BUSY_S[busy.kind] * self._scale()
        if busy.kind == "quota":
            wait_s = min(max(self.client.quota_refresh_s() or 0.0, wait_s), 6 * 3600.0)
        if wait_s > self._until_s():
            self.client.say(f"Kaggle has no room ({busy}), and --until {self.options.until} comes before the next try.")
            return False
        at = datetime.datetime.fromtimestamp(self.clock.time() + wait_s).strftime("%Y-%m-%d %H:%M")
        self.client.say(f"Kaggle has no room: {busy} Next try at {at}, in {format_duration(wait_s)}.")
        self.clock.sleep(wait_s)
        return True

    def _wait_for(self, last):
        """Until the version has ended: politely, seldomer with time. A COMPLETE of another version is not believed."""
        follower = Follower(self.client, self.ref) if self.options.follow else None
        wait_s, before, begun = self.poll_s[0], None, None
        while True:
            status, message = self.client.status(self.ref, last["version"])
            if status != before:
                self.client.say(f"Version {last['version']} is {status}" + (f": {message}" if message else ""))
                before = status
            if status == "RUNNING":
                begun = begun or self.clock.time()
                if follower:
                    follower.start()
            if status not in RUNNING and self._ended(last, status, message, begun or last["pushed"]):
                return
            self.clock.sleep(wait_s)
            wait_s = min(self.poll_s[1], 1.2 * wait_s)

    def _ended(self, last, status, message, begun):
        """Take in what an ended version left. False where its outputs are those of another version: ask again later."""
        number = self.state["sessions"].index(last) + 1
        ran_s = max(0.0, self.clock.time() - begun)
        if status == "COMPLETE":
            folder = self._folder(last)
            if not folder.exists():
                try:
                    pull(self.client, self.ref, last["version"], folder, SMALL)
                except ValueError as error:
                    return self._lose(last, f"COMPLETE, and {error}", ran_s)
            stamp = _read(folder / "kernel.json")
            if stamp.get("token") != last["token"]:
                self.client.say(f"What lies there is of another session; version {last['version']} is not ready yet")
                _drop(folder)
                return False
            told = self._told(folder)
            if not told:
                return self._lose(last, f"COMPLETE, and no status.json is among its outputs; see {folder}.log", ran_s)
            last.update(
                phase="done", state="paused" if told["state"] == "running" else told["state"], version_left=last["version"],
                reason=told.get("reason", ""), step=told.get("step"), max_steps=told.get("max_steps"),
                session_s=told.get("session_s") or ran_s, plan=told.get("plan"), read=told.get("shards_read"),
            )  # fmt: skip
            self._save()
            self._say_session(number, last)
            return True
        if kind := busy_kind(message):
            self._lose(last, message, 0.0, state="refused")
            return self._sleep_busy(Busy(message, kind)) or True
        with contextlib.suppress(Refused):  # an ended version need not have any
            _, log = self.client.outputs(self.ref, last["version"])
            if tail := "\n".join(log.splitlines()[-LOG_TAIL:]):
                self.client.say(f"The end of its log:\n{tail}")
        return self._lose(last, f"{status} {message}".strip(), ran_s)

    def _lose(self, last, reason, ran_s, state="lost"):
        last.update(phase="done", state=state, reason=reason, session_s=ran_s)
        self._save()
        self.client.say(f"This session left nothing ({reason}); the next goes on from the last that ended well.")
        return True

    def _told(self, folder):
        """`status.json` of the run folder among the outputs."""
        found = list(folder.rglob("status.json"))
        return _read(found[0]) if len(found) == 1 else {}

    def _say_session(self, number, last):
        steps = f"step {last['step']} of {last['max_steps']}" if last["step"] is not None else "no step yet"
        plan = last.get("plan") or {}
        more = f"; {plan['sessions_needed']} sessions in all" if plan.get("sessions_needed") else ""
        self.client.say(f"Session {number} is {last['state']}: {steps}{more}. {last['reason']}")

    def _finish(self, last):
        """Fetch the student and the report, print the verdict."""
        folder = self.out / "outputs"
        if not folder.exists():
            pull(self.client, self.ref, last["version"], folder, r"checkpoints/")
        found = [path.parent for path in folder.rglob("verdict.json")]
        if len(found) != 1:
            raise Refused(f"the run is complete, and {len(found)} verdicts lie in {folder}; expected one")
        self.client.say(_read(found[0] / "verdict.json").get("sentence", ""))
        self.client.say(f"Student and report: {found[0] / 'student'}, {found[0] / 'report.html'}")
        return 0

    def _folder(self, last):
        return self.out / f"session-{self.state['sessions'].index(last) + 1:03d}"

    def _save(self):
        files.write_json(self.path, self.state)


class Follower:
    """Prints a session's log as it comes, from a thread of its own; what goes wrong there is nobody's loss."""

    def __init__(self, client, ref):
        self.client, self.ref, self.thread = client, ref, None

    def start(self):
        if self.thread is None:
            self.thread = threading.Thread(target=self._follow, daemon=True)
            self.thread.start()

    def _follow(self):
        for line in self.client.log_lines(self.ref):
            self.client.say(f"  | {line}")


@contextlib.contextmanager
def alone(out):
    """Only one relay works on a folder; ValueError where another does."""
    out.mkdir(parents=True, exist_ok=True)
    with open(out / ".lock", "a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"another relay works on --out {out}") from None
        yield


def _moment(text):
    """Seconds since 1970 of a local date, `2026-12-24` or `2026-12-24 18:00`."""
    try:
        return datetime.datetime.fromisoformat(text).timestamp()
    except ValueError:
        raise ValueError(f"--until takes a date, 2026-12-24 or 2026-12-24 18:00; got {text!r}") from None


def _read(path):
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def _drop(folder):
    """Set aside outputs that are not ours."""
    os.replace(folder, folder.with_name(f"{folder.name}-stale-{secrets.token_hex(3)}"))


def run(words=None):
    options = parser(__doc__)
    options.add_argument("--out", required=True, help="a folder for what the relay knows and fetches")
    options.add_argument("--sessions", type=int, default=0, help="push at most so many (default: as many as it takes)")
    options.add_argument("--until", default="", metavar="DATE", help="push nothing that would not be over by then")
    options.add_argument("--budget-hours", type=float, default=0.0, help="hours of sessions in all (default: no limit)")
    options.add_argument("--follow", action="store_true", help="print the log while a session runs")
    options.add_argument("--poll", type=float, default=30.0, metavar="SECONDS", help="between two questions, at first")
    options = options.parse_args(words)
    if options.until:
        _moment(options.until)
    if options.sessions < 0 or options.budget_hours < 0 or options.poll <= 0:
        raise ValueError("--sessions, --budget-hours and --poll take numbers above 0")
    with alone(Path(options.out)):
        return Relay(Client(), options, poll_s=(options.poll, 10.0 * options.poll)).run()


if __name__ == "__main__":
    sys.exit(main_of(run))
