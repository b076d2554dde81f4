"""Push a run and keep pushing its next sessions until it is complete.

    python kaggle/relay.py --owner NAME --param teacher=... --param student=... --param dataset=... --out relay
        [--sessions 6] [--until 2026-12-24] [--budget-hours 30] [--follow]

Each session mounts the outputs of the previous one and resumes from them. The state is saved to `relay.json` in
`--out`: after a kill, the same options continue the relay, and no session is pushed twice. A session without outputs
(an error, a cancellation, Kaggle's limit) is lost; the next one resumes from the last successful session. Exit status:
0 the run is complete, or paused at a limit of the relay; 1 the run failed or Kaggle refused; 2 invalid input.
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
from push import checked, parser, prepared, warn

from kdlib import files
from kdlib.clock import format_duration

MAX_FAILURES = 3
"""Consecutive sessions without outputs or without progress after which the relay stops."""
LARGE = r"checkpoints/|student/|figures/|\.safetensors$"
"""Outputs that are not downloaded before the run is complete."""
BUSY_S = {"sessions": 600.0, "quota": 3600.0}
"""Seconds until the next attempt if no session can start."""
MIN_SESSION_S = 600.0
"""Minimum length of a session."""
LOG_TAIL = 30


class Relay:
    """A run over several sessions. `client`: a `Client`. `options`: parsed command-line options."""

    def __init__(self, client, options, clock=time, poll_s=(30.0, 300.0)):
        self.client, self.options, self.clock, self.poll_s = client, options, clock, poll_s
        self.out = Path(options.out)
        self.path = self.out / "relay.json"
        _, metadata, timeout_s = checked(options)
        self.ref, self.timeout_s = metadata["id"], timeout_s or kernel.SESSION_S
        if "resume" not in kernel.parameters_of(files.read_json(options.notebook)):
            raise ValueError(
                f"{options.notebook} has no parameter `resume`: the relay runs notebooks that resume one run, such as "
                "distill.ipynb; push this one with kaggle/push.py"
            )
        identity = {"kernel": self.ref, "notebook": Path(options.notebook).name, "parameters": sorted(options.param)}
        self.state = self._load_state(identity) or {**identity, "sessions": []}

    def _load_state(self, identity):
        """Returns the saved state, None in a new folder. Raises ValueError if it belongs to another run."""
        if not self.path.exists():
            if self.out.exists() and any(path.name != ".lock" for path in self.out.iterdir()):
                raise ValueError(f"--out {self.out} holds other files; give a new folder")
            return None
        state = files.read_json(self.path)
        changes = "; ".join(f"{name} was {state.get(name)!r}" for name in identity if state.get(name) != identity[name])
        if changes:
            raise ValueError(f"--out {self.out} holds another relay: {changes}. Give a new folder, or the same options")
        return state

    def run(self):
        """Runs all remaining sessions and returns the exit status."""
        status = None
        while status is None:
            try:
                status = self._advance()
            except Unreachable as problem:  # the state is saved; continue from there
                self.client.say(f"{problem}. Next attempt in {format_duration(self.poll_s[1])}.")
                self.clock.sleep(self.poll_s[1])
        return status

    def _advance(self):
        """Runs the next phase. Returns the exit status if the relay is finished, otherwise None."""
        session = self.state["sessions"][-1] if self.state["sessions"] else None
        if session is None or session["phase"] == "done":
            status = self._exit_status(session)
            if status is not None:
                return status
            session = self._add_session()
        if session["phase"] == "pushing" and not self._push(session):
            return 0
        if session["phase"] == "running":
            self._wait_for(session)
        return None

    def _exit_status(self, last):
        """Returns the exit status if no further session is needed or allowed, otherwise None."""
        sessions = self.state["sessions"]
        if last and last["state"] == "complete":
            return self._finish(last)
        if last and last["state"] == "failed":
            self.client.say(
                f"The run failed: {last['reason']}. Outputs of session {len(sessions)}: {self._folder(last)}"
            )
            return 1
        recent = sessions[-MAX_FAILURES:]
        if [session["state"] for session in recent] == ["lost"] * MAX_FAILURES:
            self.client.say(
                f"{MAX_FAILURES} consecutive sessions have no outputs; the last: {last['reason']}. See its log."
            )
            return 1
        progress = [(session.get("step"), session.get("read")) for session in recent if session["state"] == "paused"]
        if len(progress) == MAX_FAILURES and len(set(progress)) == 1:
            self.client.say(f"{MAX_FAILURES} consecutive sessions stayed at step {progress[0][0]}: {last['reason']}")
            return 1
        if limit := self._limit():
            self.client.say(
                f"Paused after {len(sessions)} sessions: {limit}. Run the same command with a higher limit to continue."
            )
            return 0
        return None

    def _limit(self):
        """Returns the limit of the relay that is reached, or an empty string."""
        if self.options.sessions and len(self.state["sessions"]) >= self.options.sessions:
            return f"--sessions {self.options.sessions} reached"
        if self._until_s() < MIN_SESSION_S * self._scale():
            return f"--until {self.options.until} reached"
        if self._hours_left_s() < MIN_SESSION_S * self._scale():
            return f"--budget-hours {self.options.budget_hours} reached"
        return ""

    def _scale(self):
        """Returns the session length relative to Kaggle's limit, which scales the minimum length and waiting times."""
        return min(1.0, self.timeout_s / kernel.SESSION_S)

    def _until_s(self):
        if not self.options.until:
            return float("inf")
        return _timestamp(self.options.until) - self.clock.time()

    def _hours_left_s(self):
        if not self.options.budget_hours:
            return float("inf")
        used_s = sum(session.get("session_s", 0.0) for session in self.state["sessions"])
        return 3600.0 * self.options.budget_hours - used_s

    def _add_session(self):
        """Adds the next session to the saved state, before it is pushed."""
        session = {"token": secrets.token_hex(8), "phase": "pushing", "begun": self.clock.time()}
        self.state["sessions"].append(session)
        self._save()
        return session

    def _push(self, session):
        """Pushes a session, waiting while Kaggle is busy. Returns False if a limit is reached meanwhile."""
        sessions, token = self.state["sessions"], session["token"]
        has_outputs = any(earlier.get("version_left") for earlier in sessions)
        budget_s = min(self._hours_left_s(), self._until_s())
        notebook, metadata, timeout_s = prepared(self.options, token, [self.ref] if has_outputs else [], budget_s)
        folder = self.out / "kernel"
        kernel.write(folder, notebook, metadata)
        while True:
            try:  # an earlier process may have pushed it before it was killed
                pushed = self.client.find(folder, token) or self.client.push(folder, token, timeout_s)
                break
            except Busy as busy:
                if not self._sleep_busy(busy):
                    self._drop(session)
                    return False
            except Unreachable:
                raise
            except Refused:  # also a version that runs without its sources: it must not be found again
                self._drop(session)
                raise
        session.update(phase="running", version=pushed.version, pushed=self.clock.time())
        self._save()
        self.client.say(f"Session {len(sessions)}: version {pushed.version} was pushed; {pushed.url}")
        return True

    def _drop(self, session):
        self.state["sessions"].remove(session)
        self._save()

    def _sleep_busy(self, busy):
        wait_s = BUSY_S[busy.kind] * self._scale()
        if busy.kind == "quota":
            wait_s = min(max(self.client.quota_refresh_s() or 0.0, wait_s), 6 * 3600.0)
        if wait_s > self._until_s():
            self.client.say(
                f"No session can start ({busy}), and --until {self.options.until} is before the next attempt."
            )
            return False
        at = datetime.datetime.fromtimestamp(self.clock.time() + wait_s).strftime("%Y-%m-%d %H:%M")
        self.client.say(f"No session can start: {busy} Next attempt at {at}, in {format_duration(wait_s)}.")
        self.clock.sleep(wait_s)
        return True

    def _wait_for(self, session):
        """Polls until the version has ended, less often over time. Ignores a COMPLETE status of another version."""
        follower = Follower(self.client, self.ref) if self.options.follow else None
        wait_s, previous, started = self.poll_s[0], None, None
        while True:
            status, message = self.client.status(self.ref, session["version"])
            if status != previous:
                self.client.say(f"Version {session['version']} is {status}" + (f": {message}" if message else ""))
                previous = status
            if status == "RUNNING":
                started = started or self.clock.time()
                if follower:
                    follower.start()
            if status not in RUNNING and self._ended(session, status, message, started or session["pushed"]):
                return
            self.clock.sleep(wait_s)
            wait_s = min(self.poll_s[1], 1.2 * wait_s)

    def _ended(self, session, status, message, started):
        """Records the results of an ended version. Returns False if its outputs are not available yet."""
        duration_s = max(0.0, self.clock.time() - started)
        if status == "COMPLETE":
            folder = self._folder(session)
            if not folder.exists():
                try:
                    pull(self.client, self.ref, session["version"], folder, LARGE)
                except ValueError as error:
                    return self._lose(session, f"COMPLETE, but {error}", duration_s)
            stamp = _read(folder / "kernel.json")
            if stamp.get("token") != session["token"]:
                self.client.say(f"The outputs belong to another session; version {session['version']} is not ready yet")
                _rename_stale(folder)
                return False
            run = self._run_status(folder)
            if not run:
                return self._lose(
                    session, f"COMPLETE, but its outputs have no status.json; see {folder}.log", duration_s
                )
            session.update(
                phase="done", state="paused" if run["state"] == "running" else run["state"],
                version_left=session["version"], reason=run.get("reason", ""), step=run.get("step"),
                max_steps=run.get("max_steps"), session_s=run.get("session_s") or duration_s, plan=run.get("plan"),
                read=run.get("shards_read"),
            )  # fmt: skip
            self._save()
            self._say_session(session)
            return True
        if kind := busy_kind(message):
            self._lose(session, message, 0.0, state="refused")
            return self._sleep_busy(Busy(message, kind)) or True
        with contextlib.suppress(Refused):  # an ended version may have no log
            _, log = self.client.outputs(self.ref, session["version"])
            if tail := "\n".join(log.splitlines()[-LOG_TAIL:]):
                self.client.say(f"Last lines of its log:\n{tail}")
        return self._lose(session, f"{status} {message}".strip(), duration_s)

    def _lose(self, session, reason, duration_s, state="lost"):
        session.update(phase="done", state=state, reason=reason, session_s=duration_s)
        self._save()
        self.client.say(
            f"This session has no outputs ({reason}); the next one resumes from the last successful session."
        )
        return True

    def _run_status(self, folder):
        """Returns `status.json` of the run folder among the outputs, or an empty dict."""
        paths = list(folder.rglob("status.json"))
        return _read(paths[0]) if len(paths) == 1 else {}

    def _say_session(self, session):
        number = self.state["sessions"].index(session) + 1
        steps = f"step {session['step']} of {session['max_steps']}" if session["step"] is not None else "no step yet"
        plan = session.get("plan") or {}
        total = f"; {plan['sessions_needed']} sessions in total" if plan.get("sessions_needed") else ""
        self.client.say(f"Session {number} is {session['state']}: {steps}{total}. {session['reason']}")

    def _finish(self, last):
        """Downloads the student and the report and prints the verdict."""
        folder = self.out / "outputs"
        if not folder.exists():
            pull(self.client, self.ref, last["version"], folder, r"checkpoints/")
        runs = [path.parent for path in folder.rglob("verdict.json")]
        if len(runs) != 1:
            raise Refused(f"the run is complete, but {folder} has {len(runs)} files verdict.json; expected 1")
        self.client.say(_read(runs[0] / "verdict.json").get("sentence", ""))
        self.client.say(f"Student and report: {runs[0] / 'student'}, {runs[0] / 'report.html'}")
        return 0

    def _folder(self, session):
        return self.out / f"session-{self.state['sessions'].index(session) + 1:03d}"

    def _save(self):
        files.write_json(self.path, self.state)


class Follower:
    """Prints a session's log from a daemon thread; its errors do not affect the relay."""

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
def exclusive(out):
    """Locks a folder for one relay. Raises ValueError if another one uses it."""
    out.mkdir(parents=True, exist_ok=True)
    with open(out / ".lock", "a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"another relay uses --out {out}") from None
        yield


def _timestamp(text):
    """Returns the Unix time of a local date, `2026-12-24` or `2026-12-24 18:00`."""
    try:
        return datetime.datetime.fromisoformat(text).timestamp()
    except ValueError:
        raise ValueError(f"--until takes a date, 2026-12-24 or 2026-12-24 18:00; got {text!r}") from None


def _read(path):
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def _rename_stale(folder):
    os.replace(folder, folder.with_name(f"{folder.name}-stale-{secrets.token_hex(3)}"))


def run(words=None):
    options = parser(__doc__)
    options.add_argument("--out", required=True, help="folder for the relay's state and downloads")
    options.add_argument("--sessions", type=int, default=0, help="maximum number of sessions (default: no limit)")
    options.add_argument("--until", default="", metavar="DATE", help="end all sessions before this date")
    options.add_argument(
        "--budget-hours", type=float, default=0.0, help="total hours of all sessions (default: no limit)"
    )
    options.add_argument("--follow", action="store_true", help="print the log while a session runs")
    options.add_argument("--poll", type=float, default=30.0, metavar="SECONDS", help="initial polling interval")
    options = options.parse_args(words)
    if options.until:
        _timestamp(options.until)
    if options.sessions < 0 or options.budget_hours < 0 or options.poll <= 0:
        raise ValueError("--sessions, --budget-hours and --poll take numbers above 0")
    warn(options)
    with exclusive(Path(options.out)):
        return Relay(Client(), options, poll_s=(options.poll, 10.0 * options.poll)).run()


if __name__ == "__main__":
    sys.exit(main_of(run))
