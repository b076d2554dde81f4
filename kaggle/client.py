"""Kaggle through its own client, and what that client leaves out: retries, a second look, answers that are no success.

The client pushes without a retry, reports `Kernel push error` and sources it did not find as if all were well, waits for
ever on a silent connection, and writes an error page into a file that it should have fetched.
"""

import contextlib
import dataclasses
import datetime
import json
import os
import random
import re
import shutil
import sys
import tempfile
import time
from pathlib import Path, PurePosixPath

TRIES = 6
FIRST_WAIT_S = 2.0
TIMEOUT_S = (30, 300)
"""Seconds to a connection, and of silence on one."""
BUSY = {
    "sessions": r"maximum batch gpu session count",
    "quota": r"weekly gpu quota|maximum weekly",
}
RUNNING = {"QUEUED", "RUNNING", "NEW_SCRIPT", "CANCEL_REQUESTED"}
INVALID = ("dataset", "kernel", "model", "competition")


class Refused(RuntimeError):
    """Kaggle said no, or could not be asked."""


class Unreachable(Refused):
    """Kaggle could not be asked for a while; later it may."""


class Busy(Refused):
    """No session can begin now. `kind`: `sessions` or `quota`."""

    def __init__(self, message, kind):
        super().__init__(message)
        self.kind = kind


@dataclasses.dataclass(frozen=True)
class Pushed:
    """A version that was made."""

    version: int
    url: str


class Ambiguous(Exception):
    """Nobody knows whether Kaggle did what it was asked to."""


class Client:
    """The authenticated client. `say` takes lines for people; `sleep` waits. ValueError without credentials."""

    def __init__(self, say=None, sleep=time.sleep):
        self.say, self.sleep = say or (lambda line: print(line, flush=True)), sleep
        self.api = _authenticated()

    def push(self, folder, token, timeout_s=None):
        """Send the kernel in `folder`, once: where an answer did not come, look for a version that carries `token` before
        sending again. `Pushed`; Busy where Kaggle has no room now; Refused where it won't have it, or leaves a source out.
        """
        ref = json.loads((Path(folder) / "kernel-metadata.json").read_text())["id"]
        for attempt in range(TRIES):
            try:
                answer = self._ask(lambda: self.api.kernels_push(str(folder), str(timeout_s) if timeout_s else None))
            except Ambiguous as problem:
                self._wait(attempt, f"no clear answer to the push ({problem}); looking whether a version was made")
                if made := self.find(ref, token):
                    return made
                continue
            return self._judged(answer, ref, token)
        raise Unreachable(f"{ref} could not be pushed in {TRIES} tries; no version was made as far as can be seen")

    def _judged(self, answer, ref, token):
        if answer is None:
            raise Refused("the client gave no answer to the push")
        if answer.error:
            kind = busy_kind(answer.error)
            raise Busy(answer.error, kind) if kind else Refused(f"Kaggle refused the push: {answer.error}")
        made = Pushed(answer.version_number, answer.url) if answer.version_number else self.find(ref, token)
        if not made:
            raise Refused(f"Kaggle took the push but made no version; look at {answer.url}")
        left_out = [
            f"{kind} {name}" for kind in INVALID for name in getattr(answer, f"invalid_{kind}_sources", None) or []
        ]
        if left_out:
            raise Refused(
                f"version {made.version} runs without what Kaggle did not find: {', '.join(left_out)}. Stop it at {made.url}"
                " and push again with sources that exist and that you may read"
            )
        return made

    def find(self, ref, token):
        """The newest version of a kernel as `Pushed`, if it carries `token`; None otherwise."""
        request, kernels = self._request("ApiGetKernelRequest", ref)
        found = self.reading(lambda: kernels(lambda client: client.get_kernel(request)), missing=(403, 404))
        if found is None or token not in (found.blob.source or ""):
            return None
        return Pushed(found.metadata.current_version_number, f"https://www.kaggle.com/code/{ref}")

    def status(self, ref, version):
        """`(status, message)` of a version: QUEUED, RUNNING, COMPLETE, ERROR, CANCEL_ACKNOWLEDGED, ..."""
        request, kernels = self._request("ApiGetKernelSessionStatusRequest", ref, version)
        found = self.reading(lambda: kernels(lambda client: client.get_kernel_session_status(request)))
        return found.status.name, found.failure_message or ""

    def quota_refresh_s(self):
        """Seconds until the weekly GPU quota begins anew; None where Kaggle does not say."""
        try:
            at = self.reading(self.api.quota_view).quota_refresh_time
        except (Refused, AttributeError):
            return None
        if at is None:
            return None
        at = at if at.tzinfo else at.replace(tzinfo=datetime.timezone.utc)
        return max(0.0, (at - datetime.datetime.now(datetime.timezone.utc)).total_seconds())

    def outputs(self, ref, version):
        """`([(name, url), ...], log)` of a version's outputs, all pages. Refused for a name that leads out of a folder."""
        files, log, page = {}, "", None
        while True:
            request, kernels = self._request("ApiListKernelSessionOutputRequest", ref, version)
            request.page_size = 100
            if page:
                request.page_token = page
            found = self.reading(
                lambda request=request, kernels=kernels: kernels(lambda c: c.list_kernel_session_output(request))
            )
            for item in found.files or []:
                path = PurePosixPath(item.file_name)
                if path.is_absolute() or ".." in path.parts or not path.parts:
                    raise Refused(
                        f"an output of {ref} is called {item.file_name!r}: it would be written outside the folder"
                    )
                files[str(path)] = item.url
            log = log or found.log or ""
            page = found.next_page_token
            if not page:
                return sorted(files.items()), text_of_log(log)

    def fetch(self, files, folder):
        """Download `[(name, url), ...]` into the new `folder`: whole, or not at all. Yields `(done, of, name)`."""
        folder = Path(folder)
        folder.parent.mkdir(parents=True, exist_ok=True)
        beside = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
        try:
            for done, (name, url) in enumerate(files):
                yield done, len(files), name
                (beside / name).parent.mkdir(parents=True, exist_ok=True)
                self.reading(lambda name=name, url=url: _download(url, beside / name))
            os.replace(beside, folder)
        except OSError as error:
            raise Refused(f"the outputs could not be written to {folder}: {error.strerror or error}") from None
        finally:
            shutil.rmtree(beside, ignore_errors=True)

    def log_lines(self, ref):
        """Lines of the newest session's log as they come; ends with the session, or when the connection does."""
        with contextlib.suppress(Exception):
            for event in self.api.kernels_logs_stream(ref):
                yield from str(event.get("data", "")).splitlines()

    def reading(self, ask, missing=()):
        """The answer to a question that changes nothing, asked again as often as is sensible; None for a status in
        `missing`. Refused where there is none.
        """
        for attempt in range(TRIES):
            try:
                return self._ask(ask, missing)
            except Ambiguous as problem:
                if attempt == TRIES - 1:
                    raise Unreachable(f"Kaggle could not be asked: {problem}") from None
                self._wait(attempt, f"Kaggle did not answer ({problem})")
        return None

    def _ask(self, ask, missing=()):
        """One call, repeated where that is safe (429). Ambiguous where it may have been done, Refused where it was not."""
        import requests

        for attempt in range(TRIES):
            try:
                return ask()
            except requests.exceptions.HTTPError as error:
                response = error.response
                code = response.status_code if response is not None else 0
                if code in missing:
                    return None
                if code == 429 and attempt < TRIES - 1:
                    self._wait(attempt, "Kaggle asks for patience (429)", _retry_after(response))
                    continue
                if code >= 500 or code == 408:
                    raise Ambiguous(f"status {code}") from None
                raise Refused(_said(error, code)) from None
            except (requests.exceptions.RequestException, json.JSONDecodeError) as error:
                raise Ambiguous(_said(error)) from None
        raise Unreachable("Kaggle kept asking for patience (429); try again later")

    def _wait(self, attempt, why, seconds=None):
        seconds = seconds or FIRST_WAIT_S * 2**attempt * random.uniform(0.75, 1.25)
        self.say(f"{why}; trying again in {seconds:.0f} s")
        self.sleep(seconds)

    def _request(self, kind, ref, version=None):
        """A request of the client's own about a kernel, and the function that gives it to the service."""
        from kagglesdk.kernels.types import kernels_api_service

        request = getattr(kernels_api_service, kind)()
        request.user_name, request.kernel_slug = ref.split("/")
        if version and hasattr(type(request), "version_label"):
            request.version_label = f"v{version}"

        def kernels(call):
            with self.api.build_kaggle_client() as client:
                return call(client.kernels.kernels_api_client)

        return request, kernels


def _authenticated():
    """The client's API object. ValueError where it has no credentials."""
    try:
        import requests
        from kaggle.api.kaggle_api_extended import KaggleApi
    except ImportError as error:
        raise ValueError(f"the Kaggle client is not installed ({error}); pip install kaggle six papermill") from None
    plain = requests.Session.send
    if not getattr(plain, "limited", False):

        def send(self, request, **how):
            how["timeout"] = how.get("timeout") or TIMEOUT_S  # the client sets none and would wait for ever
            return plain(self, request, **how)

        send.limited = True
        requests.Session.send = send
    api = KaggleApi()
    try:
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
            api.authenticate()
    except SystemExit:
        raise ValueError(
            "no Kaggle credentials; make a token at kaggle.com/settings and put it in KAGGLE_API_TOKEN, or kaggle.json in "
            "~/.kaggle"
        ) from None
    return api


def busy_kind(message):
    """`sessions` or `quota` where a message of Kaggle's says that there is no room now; None else."""
    return next((kind for kind, sign in BUSY.items() if re.search(sign, message, re.IGNORECASE)), None)


def text_of_log(log):
    """A kernel's log as plain text; Kaggle gives it as JSON events or as it is."""
    try:
        events = json.loads(log)
    except ValueError:
        return log
    if not isinstance(events, list):
        return log
    return "".join(str(event.get("data", "")) for event in events if isinstance(event, dict))


def _download(url, path):
    """One file, all of it. Raises what `requests` raises."""
    import requests

    with requests.get(url, stream=True, timeout=TIMEOUT_S) as response:
        response.raise_for_status()
        expected = response.headers.get("Content-Length")
        with open(path, "wb") as file:
            for chunk in response.iter_content(2**20):
                file.write(chunk)
    if expected and not response.headers.get("Content-Encoding") and path.stat().st_size != int(expected):
        raise requests.exceptions.ConnectionError(f"{path.name} broke off at {path.stat().st_size} of {expected} bytes")


def _retry_after(response):
    text = response.headers.get("Retry-After", "")
    return min(float(text), 600.0) if text.replace(".", "", 1).isdigit() else None


def _said(error, code=None):
    """An error in one line without a secret: no headers, no query of a signed address."""
    line = re.sub(r"\?\S+", "?...", next(iter(str(error).splitlines()), "") or type(error).__name__)[:300]
    if code in (401, 403):
        line += " (is the owner yours, the slug right, the token valid?)"
    return line


def main_of(run):
    """Run a command of this folder: its exit status, 2 and one line for a user's mistake, 1 and one line for Kaggle's no."""
    try:
        return run()
    except ValueError as error:
        print(f"kaggle: {error}", file=sys.stderr)
        return 2
    except Refused as error:
        print(f"kaggle: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("kaggle: stopped; the kernel goes on without us", file=sys.stderr)
        return 1
