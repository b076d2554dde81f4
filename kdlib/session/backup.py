"""A second copy of checkpoints, away from this machine, while the run goes on: the config keys `second_copy` and
`second_copy_saves`.

A copy is a run folder: `config.json`, `status.json`, `records.jsonl` and one checkpoint, so that `--resume` goes on with it
as it is downloaded or mounted. It is made of hard links and sent by a process of its own, which may print, hang or die as
the clients do; a thread waits for that. Nothing that goes wrong with a copy reaches the run: it is told once, and tried
again with the next checkpoint.
"""

import contextlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import threading
import warnings

from kdlib import environment

WAIT_S = 60.0
"""Seconds that the end of a session waits for a copy that is being sent."""
FOLDER = ".second-copy"
FILES = ("config.json", "status.json", "records.jsonl")
NEEDS = {"kaggle": ("kaggle", "six"), "hub": ("huggingface_hub",)}
CREDENTIALS = {"kaggle": (("KAGGLE_API_TOKEN",), ("KAGGLE_USERNAME", "KAGGLE_KEY")), "hub": (("HF_TOKEN",),)}


def of_run(config, run):
    """The `BackupUploader` of a `run_folder.RunFolder`; None where the config wants none. ValueError, in one line, where the
    client or the credentials are missing.
    """
    if not config.second_copy:
        return None
    kind = config.second_copy.partition(":")[0]
    if missing := [name for name in NEEDS[kind] if not _is_installed(name)]:
        raise ValueError(
            f"second_copy {config.second_copy} needs what is not installed: pip install {' '.join(missing)}, or leave "
            "second_copy empty"
        )
    return BackupUploader(config.second_copy, config.second_copy_saves, run, credentials(kind))


def credentials(kind):
    """`{name: value}` for the client: from the environment, else from the notebook's secrets on Kaggle. ValueError where
    neither has them.
    """
    for ask in (environment.variable, lambda name: environment.variable(name) or _secret(name)):
        for names in CREDENTIALS[kind]:
            found = {name: ask(name) for name in names}
            if all(found.values()):
                return found
    wanted = " or ".join(" and ".join(names) for names in CREDENTIALS[kind])
    raise ValueError(
        f"second_copy {kind}:... has no credentials: set {wanted} in the environment or as secrets of the Kaggle notebook, "
        "or leave second_copy empty"
    )


class BackupUploader:
    """Sends every so many checkpoints of a run. No method raises."""

    def __init__(self, where, every, run, secrets):
        self.where, self.every, self.run, self.secrets = where, every, run, secrets
        self.place = run.path / FOLDER
        self.lock = threading.Lock()
        self.num_saves, self.overdue, self.is_clean = 0, False, False
        self.problem, self.was_told = "", False
        self.waiting = self.thread = self.process = None

    def offer(self, path):
        """A checkpoint is whole: every so many are taken, and the one after a failure. One that still waits for an upload
        to end is given up for it.
        """
        self.num_saves += 1
        if not (self.overdue or self.num_saves % self.every == 0):
            return
        try:
            taken = self._set_apart(path)
        except OSError as error:
            self._failed(f"its files could not be set apart: {error.strerror or error}")
            return
        with self.lock:
            self.overdue = False
            former, self.waiting = self.waiting, taken
            if self.thread is None:
                self.thread = threading.Thread(target=self._work, name="kdlib-second-copy", daemon=True)
                try:
                    self.thread.start()
                except RuntimeError:  # the interpreter is shutting down and begins no more threads
                    self.thread = self.waiting = None
        if former:
            shutil.rmtree(former, ignore_errors=True)

    def cancel(self):
        """Let go of all that is set apart, as the disk is full; whether there was anything."""
        if not self.place.exists():
            return False
        self._stop("the disk is full, and checkpoints come first")
        return True

    def pop_alerts(self, place):
        """The alert of the first failure, once; `place()`: where the run is."""
        if not self.problem or self.was_told:
            return []
        self.was_told = True
        advice = "the run goes on; look at the connection, the credentials and the room there"
        told = {"meaning": self._meaning(), "advice": advice}
        return [{"kind": "alert", **place(), "sign": "second_copy", "part": self.where, **told}]

    def close(self):
        """Wait for a copy that is being sent, at most `WAIT_S`, and remove what was set apart."""
        thread = self.thread
        if thread is not None:
            thread.join(WAIT_S)
            if thread.is_alive():
                self._stop(f"it was still being sent {WAIT_S:g} s after the end of the session")
        shutil.rmtree(self.place, ignore_errors=True)
        if self.problem and not self.was_told:
            self.was_told = True
            with contextlib.suppress(UserWarning):  # where warnings are errors
                warnings.warn(self._meaning(), stacklevel=2)

    def _meaning(self):
        return f"the second copy to {self.where} failed: {self.problem}"

    def _set_apart(self, path):
        """A run folder that holds this checkpoint, of links where the disk has them."""
        if not self.is_clean:
            shutil.rmtree(self.place, ignore_errors=True)  # what a kill left
            self.is_clean = True
        folder = self.place / path.name
        kept = folder / "checkpoints" / path.name
        try:
            kept.mkdir(parents=True)
            for file in path.iterdir():
                try:
                    os.link(file, kept / file.name)
                except OSError:
                    shutil.copyfile(file, kept / file.name)
            for name in FILES:
                shutil.copyfile(self.run.path / name, folder / name)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        return folder

    def _work(self):
        while True:
            with self.lock:
                folder, self.waiting = self.waiting, None
                if folder is None:
                    self.thread = None
                    return
            try:
                problem = self._send(folder)
            except Exception as error:  # noqa: BLE001 - a copy is not worth a run
                problem = f"{type(error).__name__}: {error}"
            shutil.rmtree(folder, ignore_errors=True)
            if problem:
                self._failed(problem)

    def _send(self, folder):
        """What went wrong with a copy; empty where it arrived."""
        kind, _, name = self.where.partition(":")
        surroundings = environment.of_a_process(
            **self.secrets, HF_HUB_DISABLE_PROGRESS_BARS="1", HF_HUB_DISABLE_TELEMETRY="1"
        )
        words = [sys.executable, "-m", "kdlib.session.upload", kind, str(folder.resolve()), name]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
        with subprocess.Popen(words, cwd=folder, env=surroundings, start_new_session=True, **pipes) as self.process:
            said = self.process.stderr.read().decode(errors="replace")
            status = self.process.wait()
        self.process = None
        return "" if status == 0 else (said.strip().splitlines() or [f"the client ended with status {status}"])[-1]

    def _stop(self, why):
        with self.lock:
            self.waiting, thread, process = None, self.thread, self.process
        if thread is not None:
            self._failed(why)
            if process is not None:
                process.kill()
            thread.join(10.0)
        shutil.rmtree(self.place, ignore_errors=True)

    def _failed(self, problem):
        """Keep the first failure, without a credential or an address that is signed; the next checkpoint is taken."""
        for name, value in self.secrets.items():
            problem = problem if name == "KAGGLE_USERNAME" else problem.replace(value, "...")
        problem = " ".join(re.sub(r"(https?://[^/\s]*)\S*", r"\1/...", problem).split())[:300]
        with self.lock:
            self.problem = self.problem or problem
            self.overdue = self.waiting is None


def _is_installed(name):
    with contextlib.suppress(ImportError, ValueError):
        found = importlib.util.find_spec(name)
        return found is not None and found.origin is not None  # a folder of that name is no package
    return False


def _secret(name):
    """A secret of the Kaggle notebook; None where there is none, or elsewhere."""
    try:
        from kaggle_secrets import UserSecretsClient

        return UserSecretsClient().get_secret(name)
    except Exception:  # noqa: BLE001 - each kind of absence has its own class there
        return None
