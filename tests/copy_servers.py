"""Where second copies go: a Kaggle that takes data sets from the real client, and a Hub that takes commits from the real
one. What is put there stands in folders, as it would be mounted or downloaded.
"""

import base64
import hashlib
import http.server
import json
import re
import tarfile
import threading
import urllib.parse
from pathlib import Path

from kaggle_server import Handler, KaggleServer, wait_until

from kdlib.config import Config
from kdlib.session import backup, checkpoint, run_folder

KEY = "0123456789abcdef"


class DataSets(KaggleServer):
    """`versions`: `{ref: [folder, ...]}`, unpacked as Kaggle mounts them. `puts`: answers to the coming uploads of files,
    200 where there is none. `private`: what it says of each data set. `loses`: a name that gets lost while it is taken in.
    `listed`: `folders` or, not unpacked, `archives`.
    """

    def __init__(self, folder):
        super().__init__(folder)
        self.RequestHandlerClass = DataSetHandler
        self.folder.mkdir(parents=True)
        self.versions, self.blobs, self.puts, self.private = {}, {}, [], True
        self.loses, self.listed, self.unready, self.hold, self.sent = "", "folders", 0, None, []

    def make(self, ref, files):
        """A version of these blobs."""
        versions = self.versions.setdefault(ref, [])
        folder = self.folder / f"{ref.replace('/', '-')}-{len(versions) + 1}"
        folder.mkdir()
        for file in files:
            name, content = self.blobs[file["token"]]
            if name == self.loses:
                continue
            (folder / name).write_bytes(content)
            if name.endswith(".tar") and self.listed == "folders":
                with tarfile.open(folder / name) as archive:
                    archive.extractall(folder / name[: -len(".tar")], filter="data")
                (folder / name).unlink()
        versions.append(folder)
        return {"ref": ref, "url": f"https://www.kaggle.com/datasets/{ref}", "status": "ok"}


class DataSetHandler(Handler):
    def do_PUT(self):
        content = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        server = self.server
        if server.hold:
            server.hold.wait(60)
        status = server.puts.pop(0) if server.puts else 200
        if status == 200:
            token = urllib.parse.urlparse(self.path).path.rsplit("/", 1)[-1]
            server.blobs[token] = (server.blobs[token][0], content)
            server.sent.append(content)
        self._send(b"", "text/plain", status)

    def StartBlobUpload(self, request):
        token = f"blob{len(self.server.blobs)}"
        self.server.blobs[token] = (request["name"], None)
        return {"token": token, "createUrl": f"http://localhost/upload/{token}?signature=abcdef"}

    def CreateDataset(self, request):
        assert request["isPrivate"] is True
        return self.server.make(f"{request['ownerSlug']}/{request['slug']}", request["files"])

    def CreateDatasetVersion(self, request):
        return self.server.make(f"{request['ownerSlug']}/{request['datasetSlug']}", request["body"]["files"])

    def _versions(self, request):
        return self.server.versions.get(f"{request['ownerSlug']}/{request['datasetSlug']}")

    def GetDataset(self, request):
        found = self._versions(request)
        return found and {"isPrivate": self.server.private, "currentVersionNumber": len(found)}

    def GetDatasetStatus(self, request):
        if self._versions(request) and self.server.unready:
            self.server.unready -= 1
            return {"status": "BLOBS_RECEIVED"}
        return self._versions(request) and {"status": "READY"}

    def ListDatasetFiles(self, request):
        folder = self._versions(request)[-1]
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        first, size = int(request.get("pageToken") or 0), 2
        page = [
            {"name": str(p.relative_to(folder)), "totalBytes": p.stat().st_size} for p in files[first : first + size]
        ]
        more = {"nextPageToken": str(first + size)} if first + size < len(files) else {}
        return {"datasetFiles": page, **more}


class Hub(http.server.ThreadingHTTPServer):
    """One repository, in `folder`. `.safetensors` files travel as large ones do (LFS). `faults`: answers to the coming
    commits; `loses`: a path that gets lost.
    """

    daemon_threads = True

    def __init__(self, folder):
        super().__init__(("127.0.0.1", 0), HubHandler)
        self.folder, self.large = Path(folder), {}
        self.connects = []
        self.created, self.private, self.faults, self.loses, self.commits = [], True, [], "", []
        self.address = f"http://127.0.0.1:{self.server_address[1]}"
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def close(self):
        self.shutdown()
        self.server_close()

    def change(self, lines):
        """Do what the lines of a commit say."""
        for line in lines:
            told = line["value"]
            if line["key"] == "header":
                self.commits.append(told["summary"])
                continue
            path = self.folder / told["path"]
            if line["key"] == "deletedFile":
                path.unlink()
            elif told["path"] != self.loses:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(
                    self.large[told["oid"]] if line["key"] == "lfsFile" else base64.b64decode(told["content"])
                )


class HubHandler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def _send(self, value, status=200):
        body = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _body(self):
        if self.headers.get("Transfer-Encoding") == "chunked":
            found = b""
            while size := int(self.rfile.readline(), 16):
                found += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return found
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def do_CONNECT(self):
        self.server.connects.append(self.path)
        self.send_error(403)

    def do_GET(self):
        path, server = urllib.parse.urlparse(self.path).path, self.server
        if "/tree/" in path:
            files = sorted(p for p in server.folder.rglob("*") if p.is_file())
            told = [(str(p.relative_to(server.folder)), p.stat().st_size) for p in files]
            self._send([{"type": "file", "oid": "0" * 40, "path": name, "size": size} for name, size in told])
        elif re.fullmatch(r"/api/models/ann/run(/revision/main)?", path) and server.created:
            self._send({"id": "ann/run", "private": server.private, "sha": "0" * 40, "siblings": []})
        else:
            self._send({"error": "Repository not found"}, 404)

    def do_PUT(self):
        content = self._body()
        self.server.large[hashlib.sha256(content).hexdigest()] = content
        self._send(b"")

    def do_POST(self):
        path, content, server = urllib.parse.urlparse(self.path).path, self._body(), self.server
        if self.headers.get("Authorization") != "Bearer hf_abcdefgh":
            self._send({"error": "Invalid credentials"}, 401)
            return
        if path.endswith("/repos/create"):
            known, told = bool(server.created), json.loads(content)
            server.created.append(told)
            server.folder.mkdir(exist_ok=True)
            (server.folder / ".gitattributes").write_text("*.safetensors filter=lfs\n")
            self._send({"url": f"{server.address}/ann/run", "name": "ann/run"}, 409 if known else 200)
        elif "/preupload/" in path:
            kinds = [(f["path"], f["path"].endswith(".safetensors")) for f in json.loads(content)["files"]]
            told = [{"path": p, "uploadMode": "lfs" if big else "regular", "shouldIgnore": False} for p, big in kinds]
            self._send({"files": told})
        elif path.endswith("/objects/batch"):
            wanted = json.loads(content)["objects"]
            told = [{**w, "actions": {"upload": {"href": f"{server.address}/lfs/{w['oid']}"}}} for w in wanted]
            self._send({"transfer": "basic", "objects": told})
        elif "/commit/" in path:
            if server.faults:
                self._send({"error": "for hf_abcdefgh there is no room"}, server.faults.pop(0))
                return
            server.change([json.loads(line) for line in content.splitlines()])
            made = {"commitOid": "1" * 40, "commitUrl": f"{server.address}/ann/run/commit/1", "success": True}
            self._send(made)
        else:
            self._send({"error": f"no such address {path}"}, 404)


class Run:
    """A run folder whose checkpoints are made by hand, and the copies of it."""

    def __init__(self, path, where, every=1):
        path.mkdir()
        self.folder = run_folder.RunFolder(path)
        self.folder.open({"kd_method": "none"}, {}, {})
        self.folder.status("running", step=0)
        self.config = Config(second_copy=where, second_copy_saves=every)
        self.copies = backup.for_run(self.config, self.folder)

    def save(self, step):
        self.folder.records.append({"kind": "train", "step": step})
        path = self.folder.checkpoints / checkpoint.folder_name(step)
        path.mkdir(parents=True)
        (path / "state.json").write_text(f"{step}")
        (path / "student.safetensors").write_bytes(bytes(range(256)) * 40)
        (path / "manifest.json").write_text("{}")
        self.copies.offer(path)
        checkpoint.keep_last(self.folder.checkpoints, 1)

    def sent(self):
        """Wait until nothing is being sent."""
        wait_until(lambda: self.copies.thread is None)

    def pop_alerts(self):
        return self.copies.pop_alerts(lambda: {"run": "distilled", "repeat": 0, "step": 1})

    def holds(self, folder, step):
        """Whether a folder is a copy of a step."""
        names = {str(path.relative_to(folder)) for path in Path(folder).rglob("*") if path.is_file()}
        kept = f"checkpoints/{checkpoint.folder_name(step)}"
        wanted = {*backup.FILES, *(f"{kept}/{name}" for name in ("manifest.json", "state.json", "student.safetensors"))}
        return names - {".gitattributes"} == wanted and (folder / kept / "state.json").read_text() == f"{step}"
