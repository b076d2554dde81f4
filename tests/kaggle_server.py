"""A Kaggle of our own for the real client: kernels that are kept, really run by papermill, and served; faults on demand.

The client reaches it as an HTTP proxy (`environment`), so that no address of the real one is ever asked: a CONNECT, which is
how it would be, is refused and noted in `connects`.
"""

import ast
import contextlib
import http.server
import json
import os
import shutil
import subprocess
import sys
import threading
import time
import urllib.parse
from pathlib import Path

KAGGLE = Path(__file__).parent.parent / "kaggle"
CLIENTS = {path.name: path for path in (Path(sys.prefix) / "clients").glob("*")}
SIGNS = {"RUN": "RUNNING", "COMPLETE": "COMPLETE", "ERROR": "ERROR", "CANCEL": "CANCEL_ACKNOWLEDGED"}


class Version:
    """A pushed version: its request, what became of it, and where its files lie."""

    def __init__(self, number, request):
        self.number, self.request = number, request
        self.status, self.message, self.log, self.outputs = "QUEUED", "", "", None
        self.stale_polls = 0


class KaggleServer(http.server.ThreadingHTTPServer):
    """`fates`: what becomes of the coming versions, in order, then `run`: `run`, `complete` (at once, with the files of
    `leave(version, working)`), `error`, `cancel`; the last three with `:SECONDS` after they ran so long. `faults`:
    `{method: [fault, ...]}`, one a call: `429`, `500`, `401`, `403`, `html`, `drop` (before it is done), `drop after` (it is
    done and nobody hears of it). `tokens`: `{token: answer}` to whether it is good, None: unknown; any other is.
    """

    daemon_threads = True

    def __init__(self, folder, python=None, layout="new", fates=(), leave=None):
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder, self.python, self.layout, self.leave = Path(folder), python, layout, leave
        self.kernels, self.datasets, self.fates, self.faults = {}, {}, list(fates), {}
        self.tokens, self.authorizations = {}, []
        self.connects, self.calls, self.errors, self.invalid = [], [], [], {}
        self.page_size, self.quota_refresh, self.stale = 3, None, 0
        self.lock, self.workers = threading.Lock(), []
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def environment(self, home):
        """Variables for a process whose Kaggle is this one."""
        proxy = f"http://127.0.0.1:{self.server_address[1]}"
        home.mkdir(parents=True, exist_ok=True)
        kept = {
            name: value for name, value in os.environ.items() if "proxy" not in name.lower() and "KAGGLE" not in name
        }
        return {
            **kept, "KAGGLE_API_ENVIRONMENT": "LOCALHOST", "HTTP_PROXY": proxy, "HTTPS_PROXY": proxy, "http_proxy": proxy,
            "https_proxy": proxy, "HOME": str(home), "KAGGLE_CONFIG_DIR": str(home), "TMPDIR": str(home),
            "KAGGLE_USERNAME": "ann", "KAGGLE_KEY": "0123456789abcdef",
        }  # fmt: skip

    def attach(self, ref, folder):
        """Make a dataset of a folder."""
        self.datasets[ref] = Path(folder)

    def close(self):
        self.shutdown()
        for worker in self.workers:
            worker.join(timeout=120)
        self.server_close()

    def save(self, request):
        ref = request["slug"]
        if self.errors:
            return {"error": self.errors.pop(0)}
        versions = self.kernels.setdefault(ref, [])
        version = Version(len(versions) + 1, request)
        version.stale_polls = self.stale
        versions.append(version)
        worker = threading.Thread(target=self._run, args=(ref, version), daemon=True)
        self.workers.append(worker)
        worker.start()
        address = f"https://www.kaggle.com/code/{ref}"
        return {"ref": f"/code/{ref}", "url": address, "versionNumber": version.number, "kernelId": 7, **self.invalid}

    def _run(self, ref, version):
        fate, _, more = (self.fates.pop(0) if self.fates else "run").partition(":")
        version.status = "RUNNING"
        machine = self.folder / f"{ref.replace('/', '-')}-{version.number}"
        working = machine / "working"
        working.mkdir(parents=True)
        if fate == "complete":
            if self.leave:
                self.leave(version, working)
            version.outputs, version.status = working, "COMPLETE"
            return
        if fate in ("error", "cancel") and not more:
            self._end(version, fate, "it was so decided")
            return
        try:
            self._mount(machine / "input", version.request)
            code = self._papermill(
                machine, version, float(more) if more else version.request.get("sessionTimeoutSeconds")
            )
        except subprocess.TimeoutExpired:
            self._end(version, "cancel" if fate == "cancel" else "error", "the session ran out of time")
        else:
            if code == 0 and fate == "run":
                version.outputs, version.status = working, "COMPLETE"
            else:
                self._end(version, "error", f"exit status {code}")

    @staticmethod
    def _end(version, fate, message):
        version.log = version.log or json.dumps([{"stream_name": "stderr", "time": 1.0, "data": f"{message}\n"}])
        version.message, version.status = message, SIGNS[fate.upper()]

    def _mount(self, place, request):
        """The inputs of a version, read-only in spirit: its data sets, and the last COMPLETE version of its kernels."""
        place.mkdir()
        sources = [("datasets", ref, self.datasets[ref]) for ref in request.get("datasetDataSources", [])]
        for ref in request.get("kernelDataSources", []):
            done = [version for version in self.kernels.get(ref, []) if version.outputs]
            if done:
                sources.append(("notebooks", ref, done[-1].outputs))
        for kind, ref, folder in sources:
            owner, slug = ref.split("/")
            target = place / kind / owner / slug if self.layout == "new" else place / slug
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copytree(folder, target)

    def _papermill(self, machine, version, limit_s):
        """Run the notebook as Kaggle does: papermill, in the working folder, nothing of ours installed."""
        working, notebook = machine / "working", machine / "kernel.ipynb"
        notebook.write_text(version.request["text"])
        (machine / "proc" / "1").mkdir(parents=True)
        (machine / "proc" / "1" / "stat").write_text("1 (init) S " + " ".join(["0"] * 30))
        (machine / "proc" / "uptime").write_text("2.0 1.0")
        surroundings = {
            "PATH": os.environ["PATH"], "HOME": str(machine), "TMPDIR": str(machine), "OMP_NUM_THREADS": "1",
            "PYTHONWARNINGS": "ignore", "KAGGLE_KERNEL_RUN_TYPE": "Batch", "KAGGLE_DOCKER_IMAGE": "gcr.io/an-image@sha256:0",
            "KDLIB_KAGGLE_INPUT": str(machine / "input"), "KDLIB_PROC": str(machine / "proc"), "HF_HUB_OFFLINE": "1",
            "PYTHONDONTWRITEBYTECODE": "1",
        }  # fmt: skip
        words = [
            self.python,
            "-m",
            "papermill",
            str(notebook),
            str(machine / "run.ipynb"),
            "--no-progress-bar",
            "--log-output",
        ]
        with open(machine / "log", "w") as log:
            process = subprocess.Popen(
                words, cwd=working, env=surroundings, stdout=log, stderr=log, start_new_session=True, text=True
            )
            try:
                return process.wait(timeout=limit_s)
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, 9)
                process.wait()
                lines = (machine / "log").read_text().splitlines(keepends=True)
                version.log = json.dumps([{"stream_name": "stdout", "time": 0.1, "data": line} for line in lines])


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def do_CONNECT(self):
        self.server.connects.append(self.path)
        self.send_error(403)

    def do_GET(self):
        path = urllib.parse.unquote(urllib.parse.urlparse(self.path).path)
        self.server.calls.append(("GET", path))
        if "/kernels/logs/stream/" in path:
            owner, slug = path.split("/")[-2:]
            self._send(self.server.kernels[f"{owner}/{slug}"][-1].log.encode() or b"[]", "application/json")
        elif path.startswith("/files/") and not self._faulty("files"):
            _, _, owner, slug, number, name = path.split("/", 5)
            version = self.server.kernels[f"{owner}/{slug}"][int(number) - 1]
            self._send((version.outputs / name).read_bytes(), "application/octet-stream")

    def do_POST(self):
        request = json.loads(self.rfile.read(int(self.headers.get("Content-Length", 0))) or b"{}")
        method = urllib.parse.urlparse(self.path).path.rsplit("/", 1)[-1]
        self.server.calls.append((method, request))
        if method == "SaveKernel":
            self.server.authorizations.append(self.headers["Authorization"])
        if self._faulty(method, request):
            return
        answer = getattr(self, method)(request)
        if answer is None:
            self._send(json.dumps({"code": 404, "message": "Not found"}).encode(), "application/json", 404)
        else:
            self._send(json.dumps(answer).encode(), "application/json")

    def _faulty(self, method, request=None):
        faults = self.server.faults.get(method, [])
        fault = faults.pop(0) if faults else ""
        if fault == "429":
            self._send(
                b'{"code": 429, "message": "Too many requests"}', "application/json", 429, {"Retry-After": "0.01"}
            )
        elif fault == "500":
            self._send(b'{"code": 500, "message": "Internal error"}', "application/json", 500)
        elif fault in ("401", "403"):
            words = {"401": "Unauthenticated", "403": "Permission denied"}[fault]
            self._send(json.dumps({"code": int(fault), "message": words}).encode(), "application/json", int(fault))
        elif fault == "html":
            self._send(b"<html><body>We will be back soon</body></html>", "text/html")
        elif fault.startswith("drop"):
            if fault == "drop after":
                getattr(self, method)(request)
            self.close_connection = True
            self.connection.shutdown(2)
        return bool(fault)

    def _send(self, body, kind, code=200, more=()):
        self.send_response(code)
        self.send_header("Content-Type", kind)
        self.send_header("X-Kaggle-APIVersion", "99.0")  # the client then prints that it is outdated
        self.send_header("Content-Length", str(len(body)))
        for name, value in dict(more).items():
            self.send_header(name, value)
        self.end_headers()
        with contextlib.suppress(BrokenPipeError):
            self.wfile.write(body)

    def _version(self, request):
        versions = self.server.kernels.get(f"{request['userName']}/{request['kernelSlug']}", [])
        label = request.get("versionLabel")
        if not versions:
            return None
        return versions[int(label[1:]) - 1] if label else versions[-1]

    def SaveKernel(self, request):
        with self.server.lock:
            return self.server.save(request)

    def GetKernel(self, request):
        found = self._version(request)
        if found is None:
            return None
        metadata = {
            "id": 7,
            "ref": found.request["slug"],
            "slug": request["kernelSlug"],
            "currentVersionNumber": found.number,
        }
        for kind in ("dataset", "kernel", "model"):
            refused = self.server.invalid.get(f"invalid{kind.title()}Sources", [])
            name = f"{kind}DataSources"
            metadata[name] = [source for source in found.request.get(name, []) if source not in refused]
        return {"metadata": metadata, "blob": {"source": found.request["text"], "kernelType": "notebook"}}

    def GetKernelSessionStatus(self, request):
        found = self._version(request)
        if found is None:
            return None
        if found.stale_polls:
            found.stale_polls -= 1
            return {"status": "COMPLETE"}
        return {"status": found.status, "failureMessage": found.message}

    def ListKernelSessionOutput(self, request):
        found = self._version(request)
        if found is not None and found.outputs is None:  # what one sees then is of the version before, if of any
            before = self.server.kernels[f"{request['userName']}/{request['kernelSlug']}"][: found.number - 1]
            older = [version for version in before if version.outputs]
            if found.status != "COMPLETE" and not older:
                return {"files": [], "log": found.log}
            found = older[-1] if older and not found.log else found
        names = (
            sorted(str(p.relative_to(found.outputs)) for p in found.outputs.rglob("*") if p.is_file())
            if found.outputs
            else []
        )
        first = int(request.get("pageToken") or 0)
        size = min(request.get("pageSize", 20), self.server.page_size)
        base = f"http://localhost/files/{request['userName']}/{request['kernelSlug']}/{found.number}/"
        files = [{"fileName": n, "url": base + urllib.parse.quote(n)} for n in names[first : first + size]]
        more = {"nextPageToken": str(first + size)} if first + size < len(names) else {}
        return {"files": files, "log": found.log, **more}

    def GetAcceleratorQuotaStatistics(self, request):
        return {"quotaRefreshTime": self.server.quota_refresh} if self.server.quota_refresh else {}

    def IntrospectToken(self, request):
        return self.server.tokens.get(request["token"], {"active": True, "username": "ann"})

    def GenerateAccessToken(self, request):
        return {"token": "refreshed", "expiresIn": 3600, "userName": "ann"}


def wait_until(true, seconds=60.0):
    """Poll `true()` until it is; AssertionError after so many seconds."""
    begun = time.monotonic()
    while not true():
        assert time.monotonic() - begun < seconds, "it never came true"
        time.sleep(0.05)


QUICK = """
import sys
sys.path.insert(0, {folder!r})
import client, {name}
client.FIRST_WAIT_S = 0.01
{more}
sys.exit(client.main_of(lambda: {name}.run({words!r})))
"""


def command(server, tmp_path, name, words, version="2.2.5", more="", **changes):
    """Run `kaggle/{name}.py` with `words` in a process of its own, by a version of the client, after the code `more`."""
    code = QUICK.format(folder=str(KAGGLE), name=name, words=[str(word) for word in words], more=more)
    environment = {**server.environment(tmp_path / "home"), "PYTHONPATH": str(CLIENTS[version]), **changes}
    environment = {name: value for name, value in environment.items() if value is not None}
    return subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, cwd=tmp_path, timeout=400
    )


def pushes(server):
    return [request for method, request in server.calls if method == "SaveKernel"]


def files_of(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def leave(version, working):
    """What a session of a run leaves: paused, and complete as the third version."""
    done = version.number >= 3
    (working / "kernel.json").write_text(json.dumps(stamp_of(version)))
    run = working / "run"
    (run / "student").mkdir(parents=True)
    (run / "student" / "model.safetensors").write_bytes(b"weights")
    told = {"state": "complete" if done else "paused", "reason": "" if done else "time is up", "step": version.number}
    (run / "status.json").write_text(
        json.dumps({**told, "max_steps": 3, "sessions": version.number, "session_s": 60.0})
    )
    if done:
        (run / "verdict.json").write_text(json.dumps({"sentence": "Distillation helped."}))
        (run / "report.html").write_text("<p>")


def stamp_of(version):
    """What the cell that carries kdlib leaves as kernel.json."""
    source = next(s for cell in json.loads(version.request["text"])["cells"] if "PACKED" in (s := cell["source"]))
    return ast.literal_eval(source.rsplit("json.dumps(", 1)[1].split("))", 1)[0])
