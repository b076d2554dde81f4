"""A wrapper of Kaggle's API client with retries, timeouts and error checks.

The original client pushes without retries, reports push errors and missing sources as success, has no timeout, and
writes error pages into downloaded files.
"""

import contextlib
import dataclasses
import datetime
import functools
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
"""Timeouts in seconds: to connect, and between two received bytes."""
BUSY = {
    "sessions": r"maximum batch gpu session count",
    "quota": r"weekly gpu quota|maximum weekly",
}
RUNNING = {"QUEUED", "RUNNING", "NEW_SCRIPT", "CANCEL_REQUESTED"}
SOURCE_KINDS = ("dataset", "kernel", "model", "competition")
NEW_CREDENTIALS = (
    "run `kaggle auth login`, or create a token at kaggle.com/settings and save it as ~/.kaggle/access_token or in "
    "KAGGLE_API_TOKEN"
)


class Refused(RuntimeError):
    """Raised if Kaggle refuses a request or cannot be reached."""


class Unreachable(Refused):
    """Raised if Kaggle does not respond after all retries."""


class Busy(Refused):
    """Raised if no session can start now. `kind`: `sessions` or `quota`."""

    def __init__(self, message, kind):
        super().__init__(message)
        self.kind = kind


@dataclasses.dataclass(frozen=True)
class Pushed:
    """A pushed kernel version."""

    version: int
    url: str


class Ambiguous(Exception):
    """Raised if it is unknown whether Kaggle executed a request."""


class Client:
    """Authenticated client. `say(line)` prints messages. Raises ValueError without credentials, Refused for bad ones."""

    def __init__(self, say=None, sleep=time.sleep):
        self.say, self.sleep = say or functools.partial(print, file=sys.stdout, flush=True), sleep
        self.api = self.query(_authenticated)

    def push(self, folder, token, timeout_s=None):
        """Pushes the kernel in `folder` exactly once: before a retry, looks for a version that contains `token`.

        Returns `Pushed`. Raises Busy if no session can start now, Refused for rejected kernels and missing sources.
        """
        ref = _metadata(folder)["id"]
        for attempt in range(TRIES):
            try:
                response = self._call(lambda: self.api.kernels_push(str(folder), str(timeout_s) if timeout_s else None))
            except Ambiguous as problem:
                self._wait(
                    attempt, f"no clear response to the push ({problem}); checking whether a version was created"
                )
                if pushed := self.find(folder, token):
                    return pushed
                continue
            return self._check_push(response, folder, token)
        raise Unreachable(f"{ref} could not be pushed in {TRIES} attempts; no new version was found")

    def _check_push(self, response, folder, token):
        ref = _metadata(folder)["id"]
        if response is None:
            raise Refused("the client returned no response to the push")
        if response.error:
            if kind := busy_kind(response.error):
                raise Busy(response.error, kind)
            raise Refused(f"Kaggle refused the push: {response.error}{self._hint(response.error, ref)}")
        pushed = Pushed(response.version_number, response.url) if response.version_number else self.find(folder, token)
        if not pushed:
            raise Refused(f"Kaggle accepted the push but created no version; see {response.url}")
        _check_sources(
            pushed, {kind: getattr(response, f"invalid_{kind}_sources", None) or [] for kind in SOURCE_KINDS}
        )
        return pushed

    def _hint(self, error, ref):
        if "not found" not in error.lower():
            return ""
        user = self.api.config_values.get(self.api.CONFIG_NAME_USER)
        return (
            f"; {ref} is another user's or its name is taken: the credentials are those of {user!r}, which --owner must "
            "name; otherwise give another --title"
        )

    def find(self, folder, token):
        """Returns the newest version of the kernel in `folder` as `Pushed` if it contains `token`, otherwise None.

        Raises Refused if it has fewer sources than the kernel in `folder`.
        """
        metadata = _metadata(folder)
        request, kernels = self._request("ApiGetKernelRequest", metadata["id"])
        kernel = self.query(lambda: kernels(lambda client: client.get_kernel(request)), missing=(403, 404))
        if kernel is None or token not in (kernel.blob.source or ""):
            return None
        pushed = Pushed(kernel.metadata.current_version_number, f"https://www.kaggle.com/code/{metadata['id']}")
        missing = {}
        for kind in SOURCE_KINDS:
            asked, listed = metadata[f"{kind}_sources"], getattr(kernel.metadata, f"{kind}_data_sources") or []
            missing[kind] = [name for name in asked if name not in listed] if len(listed) < len(asked) else []
        _check_sources(pushed, missing)
        return pushed

    def status(self, ref, version):
        """Returns `(status, message)` of a version: QUEUED, RUNNING, COMPLETE, ERROR, CANCEL_ACKNOWLEDGED, ..."""
        request, kernels = self._request("ApiGetKernelSessionStatusRequest", ref, version)
        session = self.query(lambda: kernels(lambda client: client.get_kernel_session_status(request)))
        return session.status.name, session.failure_message or ""

    def quota_refresh_s(self):
        """Returns the seconds until the weekly GPU quota resets, or None if unknown."""
        try:
            reset = self.query(self.api.quota_view).quota_refresh_time
        except (Refused, AttributeError):
            return None
        if reset is None:
            return None
        reset = reset if reset.tzinfo else reset.replace(tzinfo=datetime.timezone.utc)
        return max(0.0, (reset - datetime.datetime.now(datetime.timezone.utc)).total_seconds())

    def outputs(self, ref, version):
        """Returns `([(name, url), ...], log)` of a version's outputs. Raises Refused for names outside the folder."""
        files, log, page = {}, "", None
        while True:
            request, kernels = self._request("ApiListKernelSessionOutputRequest", ref, version)
            request.page_size = 100
            if page:
                request.page_token = page
            listing = self.query(
                lambda request=request, kernels=kernels: kernels(lambda c: c.list_kernel_session_output(request))
            )
            for item in listing.files or []:
                path = PurePosixPath(item.file_name)
                if path.is_absolute() or ".." in path.parts or not path.parts:
                    raise Refused(f"output {item.file_name!r} of {ref} would be written outside the folder")
                files[str(path)] = item.url
            log = log or listing.log or ""
            page = listing.next_page_token
            if not page:
                return sorted(files.items()), text_of_log(log)

    def fetch(self, files, folder):
        """Downloads `[(name, url), ...]` to a new folder, atomically. Yields `(done, total, name)`."""
        folder = Path(folder)
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
        try:
            for done, (name, url) in enumerate(files):
                yield done, len(files), name
                (temporary / name).parent.mkdir(parents=True, exist_ok=True)
                self.query(lambda name=name, url=url: _download(url, temporary / name))
            os.replace(temporary, folder)
        except OSError as error:
            raise Refused(f"the outputs could not be written to {folder}: {error.strerror or error}") from None
        finally:
            shutil.rmtree(temporary, ignore_errors=True)

    def log_lines(self, ref):
        """Yields new lines of the latest session's log until the session or the connection ends."""
        with contextlib.suppress(Exception):
            for event in self.api.kernels_logs_stream(ref):
                yield from str(event.get("data", "")).splitlines()

    def query(self, request, missing=()):
        """Calls a read-only `request` with retries. Returns None for a status code in `missing`; may raise Refused."""
        for attempt in range(TRIES):
            try:
                return self._call(request, missing)
            except Ambiguous as problem:
                if attempt == TRIES - 1:
                    raise Unreachable(f"Kaggle did not respond: {problem}") from None
                self._wait(attempt, f"Kaggle did not respond ({problem})")
        return None

    def _call(self, request, missing=()):
        """Calls `request`, retrying status 429 only. Raises Ambiguous if it may have been executed, Refused if not.

        Discards what the original client prints.
        """
        import requests

        for attempt in range(TRIES):
            try:
                with open(os.devnull, "w") as null, contextlib.redirect_stdout(null), contextlib.redirect_stderr(null):
                    return request()
            except requests.exceptions.HTTPError as error:
                response = error.response
                code = response.status_code if response is not None else 0
                if code in missing:
                    return None
                if code == 429 and attempt < TRIES - 1:
                    self._wait(attempt, "Kaggle limits the request rate (429)", _retry_after(response))
                    continue
                if code >= 500 or code == 408:
                    raise Ambiguous(f"status {code}") from None
                raise Refused(_describe(error, code)) from None
            except (requests.exceptions.RequestException, json.JSONDecodeError) as error:
                raise Ambiguous(_describe(error)) from None
        raise Unreachable("Kaggle still limits the request rate (429); try again later")

    def _wait(self, attempt, reason, seconds=None):
        seconds = seconds or FIRST_WAIT_S * 2**attempt * random.uniform(0.75, 1.25)
        self.say(f"{reason}; retrying in {seconds:.0f} s")
        self.sleep(seconds)

    def _request(self, kind, ref, version=None):
        """Returns a request object of the client about a kernel, and the function that sends it."""
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
    """Returns the client's authenticated API object. Raises ValueError without credentials, Refused for bad ones."""
    import requests
    from kagglesdk import KaggleCredentials, get_access_token_from_env

    original = requests.Session.send
    if not getattr(original, "has_timeout", False):

        def send(self, request, **kwargs):
            kwargs["timeout"] = kwargs.get("timeout") or TIMEOUT_S  # the client sets none and would wait forever
            return original(self, request, **kwargs)

        send.has_timeout = True
        requests.Session.send = send
    has_login = (
        Path(KaggleCredentials.DEFAULT_CREDENTIALS_FILE).expanduser().exists()
    )  # the client deletes an expired one
    from kaggle.api.kaggle_api_extended import KaggleApi  # authenticates, hiding errors

    api = KaggleApi()
    with contextlib.suppress(SystemExit):
        api.authenticate()
    token, source = get_access_token_from_env()
    if token and api.config_values.get(api.CONFIG_NAME_TOKEN) != token:  # other credentials would not be used either
        source = {"access_token": "~/.kaggle/access_token"}.get(source, source)
        problem = "has expired or was revoked" if _is_known(api, token) else "is unknown to Kaggle: wrong or incomplete"
        raise Refused(f"the token of {source} {problem}; {NEW_CREDENTIALS}")
    if api.CONFIG_NAME_AUTH_METHOD not in api.config_values:
        if has_login:
            raise Refused(f"the login of `kaggle auth login` has expired; {NEW_CREDENTIALS}")
        raise ValueError(
            f"no Kaggle credentials; {NEW_CREDENTIALS} (kaggle.json holds only the older pair of user name and key)"
        )
    return api


def _is_known(api, token):
    """Whether Kaggle has issued a token that it does not accept."""
    import requests
    from kagglesdk.security.types.oauth_service import IntrospectTokenRequest

    request = IntrospectTokenRequest()
    request.token = token
    try:
        with api.build_kaggle_client() as client:
            client.security.oauth_client.introspect_token(request)
    except requests.exceptions.HTTPError as error:
        if error.response.status_code in (400, 403, 404):
            return False
        raise
    return True


def _metadata(folder):
    return json.loads((Path(folder) / "kernel-metadata.json").read_text())


def _check_sources(pushed, missing):
    """Raises Refused if a version runs without some of its sources, `{kind: names}`."""
    if any(missing.values()):
        listed = ", ".join(f"{kind} {name}" for kind, names in missing.items() for name in names)
        raise Refused(
            f"version {pushed.version} runs without sources that Kaggle did not find: {listed}. Cancel it under View Active "
            f"Events on kaggle.com, or at {pushed.url}; the client has no command for it. Then push again with sources that "
            "exist and that you can read"
        )


def busy_kind(message):
    """Returns `sessions` or `quota` if a message of Kaggle reports such a limit, otherwise None."""
    return next((kind for kind, pattern in BUSY.items() if re.search(pattern, message, re.IGNORECASE)), None)


def text_of_log(log):
    """Converts a kernel's log (JSON events or plain text) to plain text."""
    try:
        events = json.loads(log)
    except ValueError:
        return log
    if not isinstance(events, list):
        return log
    return "".join(str(event.get("data", "")) for event in events if isinstance(event, dict))


def _download(url, path):
    """Downloads one file. Raises exceptions of `requests`."""
    import requests

    with requests.get(url, stream=True, timeout=TIMEOUT_S) as response:
        response.raise_for_status()
        expected = response.headers.get("Content-Length")
        with open(path, "wb") as file:
            for chunk in response.iter_content(2**20):
                file.write(chunk)
    if expected and not response.headers.get("Content-Encoding") and path.stat().st_size != int(expected):
        raise requests.exceptions.ConnectionError(f"{path.name} ended after {path.stat().st_size} of {expected} bytes")


def _retry_after(response):
    text = response.headers.get("Retry-After", "")
    return min(float(text), 600.0) if text.replace(".", "", 1).isdigit() else None


def _describe(error, code=None):
    """Returns an error as one line without secrets: no headers, no query of a signed URL."""
    line = re.sub(r"\?\S+", "?...", next(iter(str(error).splitlines()), "") or type(error).__name__)[:300]
    if code == 401:
        return f"Kaggle does not accept the credentials: {line}; {NEW_CREDENTIALS}"
    return f"{line} (check the owner, the slug and the token)" if code == 403 else line


def main_of(run):
    """Runs a command and returns its exit status: 2 for invalid input, 1 if Kaggle refuses or the user interrupts."""
    try:
        return run()
    except ImportError as error:
        print(f"kaggle: {error}; pip install -r kaggle/requirements.txt", file=sys.stderr)
        return 2
    except ValueError as error:
        print(f"kaggle: {error}", file=sys.stderr)
        return 2
    except Refused as error:
        print(f"kaggle: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("kaggle: interrupted; the kernel keeps running", file=sys.stderr)
        return 1
