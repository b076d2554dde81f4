"""Second copy of checkpoints on Kaggle or the Hugging Face Hub, uploaded during training (config keys `second_copy` and
`second_copy_saves`).

A copy is a run folder (`config.json`, `status.json`, `records.jsonl` and one checkpoint) that `--resume` accepts. It is
staged as hard links and uploaded by a separate process, since the clients may print, hang or exit. A failed upload
never affects the run: it raises one alert, and the next checkpoint is uploaded instead.
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
"""Seconds that the end of a session waits for an upload in progress."""
FOLDER = ".second-copy"
FILES = ("config.json", "status.json", "records.jsonl")
NEEDS = {"kaggle": ("kaggle", "six"), "hub": ("huggingface_hub",)}
CREDENTIALS = {"kaggle": (("KAGGLE_API_TOKEN",), ("KAGGLE_USERNAME", "KAGGLE_KEY")), "hub": (("HF_TOKEN",),)}


def for_run(config, run):
    """Returns the `BackupUploader` of a `run_folder.RunFolder`, or None if `second_copy` is empty. Raises ValueError if
    the client or the credentials are missing.
    """
    if not config.second_copy:
        return None
    kind = config.second_copy.partition(":")[0]
    if missing := [name for name in NEEDS[kind] if not _is_installed(name)]:
        raise ValueError(
            f"second_copy {config.second_copy} needs missing packages: pip install {' '.join(missing)}, or leave "
            "second_copy empty"
        )
    return BackupUploader(config.second_copy, config.second_copy_saves, run, credentials(kind))


def credentials(kind):
    """Returns `{name: value}` from the environment, or from a Kaggle notebook's secrets, or raises ValueError."""
    for lookup in (environment.variable, lambda name: environment.variable(name) or secret(name)):
        for names in CREDENTIALS[kind]:
            values = {name: lookup(name) for name in names}
            if all(values.values()):
                return values
    choices = " or ".join(" and ".join(names) for names in CREDENTIALS[kind])
    raise ValueError(
        f"second_copy {kind}:... has no credentials: set {choices} in the environment or as secrets of the Kaggle notebook, "
        "or leave second_copy empty"
    )


class BackupUploader:
    """Uploader of every `interval`-th checkpoint of a run. Its methods raise no errors."""

    def __init__(self, destination, interval, run, secrets):
        self.destination, self.interval, self.run, self.secrets = destination, interval, run, secrets
        self.staging = run.path / FOLDER
        self.lock = threading.Lock()
        self.num_saves, self.overdue, self.is_clean = 0, False, False
        self.problem, self.was_reported = "", False
        self.waiting = self.thread = self.process = None

    def offer(self, path):
        """Uploads a new checkpoint if one is due or the last upload failed. It replaces one that is still waiting."""
        self.num_saves += 1
        if not (self.overdue or self.num_saves % self.interval == 0):
            return
        try:
            staged = self._stage(path)
        except OSError as error:
            self._record_failure(f"staging its files failed: {error.strerror or error}")
            return
        with self.lock:
            self.overdue = False
            replaced, self.waiting = self.waiting, staged
            if self.thread is None:
                self.thread = threading.Thread(target=self._upload_all, name="kdlib-second-copy", daemon=True)
                try:
                    self.thread.start()
                except RuntimeError:  # the interpreter is shutting down and starts no more threads
                    self.thread = self.waiting = None
        if replaced:
            shutil.rmtree(replaced, ignore_errors=True)

    def cancel(self):
        """Removes staged files to free a full disk, and returns whether there were any."""
        if not self.staging.exists():
            return False
        self._stop("the disk is full, and checkpoints come first")
        return True

    def pop_alerts(self, get_place):
        """Returns the alert of the first failure, once. `get_place()` returns run, repeat and step."""
        if not self.problem or self.was_reported:
            return []
        self.was_reported = True
        advice = "training continues; check the connection, the credentials and the quota of the account"
        text = {"meaning": self._meaning(), "advice": advice}
        return [{"kind": "alert", **get_place(), "sign": "second_copy", "part": self.destination, **text}]

    def close(self):
        """Waits at most `WAIT_S` for an upload in progress, and removes staged files."""
        thread = self.thread
        if thread is not None:
            thread.join(WAIT_S)
            if thread.is_alive():
                self._stop(f"the upload was unfinished {WAIT_S:g} s after the end of the session")
        shutil.rmtree(self.staging, ignore_errors=True)
        if self.problem and not self.was_reported:
            self.was_reported = True
            with contextlib.suppress(UserWarning):  # if warnings are errors
                warnings.warn(self._meaning(), stacklevel=2)

    def _meaning(self):
        return f"the second copy to {self.destination} failed: {self.problem}"

    def _stage(self, path):
        """Returns a new run folder with this checkpoint, as hard links if the file system supports them."""
        if not self.is_clean:
            shutil.rmtree(self.staging, ignore_errors=True)  # left by a killed process
            self.is_clean = True
        folder = self.staging / path.name
        target = folder / "checkpoints" / path.name
        try:
            target.mkdir(parents=True)
            for file in path.iterdir():
                try:
                    os.link(file, target / file.name)
                except OSError:
                    shutil.copyfile(file, target / file.name)
            for name in FILES:
                shutil.copyfile(self.run.path / name, folder / name)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        return folder

    def _upload_all(self):
        while True:
            with self.lock:
                folder, self.waiting = self.waiting, None
                if folder is None:
                    self.thread = None
                    return
            try:
                problem = self._send(folder)
            except Exception as error:  # noqa: BLE001 - a failed copy must not end the run
                problem = f"{type(error).__name__}: {error}"
            shutil.rmtree(folder, ignore_errors=True)
            if problem:
                self._record_failure(problem)

    def _send(self, folder):
        """Uploads a staged folder, and returns the error message or ""."""
        kind, _, name = self.destination.partition(":")
        env = environment.child_environment(
            **self.secrets, HF_HUB_DISABLE_PROGRESS_BARS="1", HF_HUB_DISABLE_TELEMETRY="1"
        )
        command = [sys.executable, "-m", "kdlib.session.upload", kind, str(folder.resolve()), name]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
        with subprocess.Popen(command, cwd=folder, env=env, start_new_session=True, **pipes) as self.process:
            output = self.process.stderr.read().decode(errors="replace")
            status = self.process.wait()
        self.process = None
        return "" if status == 0 else (output.strip().splitlines() or [f"the client exited with status {status}"])[-1]

    def _stop(self, reason):
        with self.lock:
            self.waiting, thread, process = None, self.thread, self.process
        if thread is not None:
            self._record_failure(reason)
            if process is not None:
                process.kill()
            thread.join(10.0)
        shutil.rmtree(self.staging, ignore_errors=True)

    def _record_failure(self, problem):
        """Keeps the first failure, without credentials and signed URLs. The next checkpoint will be uploaded."""
        for name, value in self.secrets.items():
            problem = problem if name == "KAGGLE_USERNAME" else problem.replace(value, "...")
        problem = " ".join(re.sub(r"(https?://[^/\s]*)\S*", r"\1/...", problem).split())[:300]
        with self.lock:
            self.problem = self.problem or problem
            self.overdue = self.waiting is None


def _is_installed(name):
    with contextlib.suppress(ImportError, ValueError):
        spec = importlib.util.find_spec(name)
        return spec is not None and spec.origin is not None  # None: a plain folder of that name
    return False


def secret(name):
    """Returns a secret of the Kaggle notebook, or None."""
    try:
        from kaggle_secrets import UserSecretsClient

        return UserSecretsClient().get_secret(name)
    except Exception:  # noqa: BLE001 - every reason for a missing secret raises another class
        return None
