"""Upload of a run folder to Kaggle or the Hugging Face Hub, in the process that `backup` starts for each copy. The
clients may print, exit or hang. The last line on stderr is the error message.

Kaggle keeps no folders in an upload: `checkpoints` is sent as `checkpoints.tar`, which Kaggle unpacks, so that the
mounted data set is a run folder. Older versions are kept, and count towards the quota. On the Hub each upload is one
commit, which also deletes the previous checkpoint from the main branch; it stays in the history.
"""

import json
import os
import sys
import threading
from pathlib import Path

READY_POLLS, POLL_S = 100, 10.0
"""Maximum number of polls, and maximum seconds between them, until Kaggle has processed a data set."""
TIMEOUT_S = (30, 300)
"""Connect and read timeouts in seconds. Kaggle's client has none."""


def to_kaggle(folder, name):
    """Creates the private data set `OWNER/NAME` or a new version. Raises SystemExit unless all files arrived."""
    import requests

    send_without_timeout = requests.Session.send

    def send(self, request, **options):
        options["timeout"] = options.get("timeout") or TIMEOUT_S
        return send_without_timeout(self, request, **options)

    requests.Session.send = send
    from kaggle.api.kaggle_api_extended import KaggleApi

    class StrictApi(KaggleApi):
        """Client that raises if a file could not be uploaded; some versions omit the file."""

        def upload_files(self, request, *options):
            super().upload_files(request, *options)
            num_files = sum(1 for path in folder.iterdir() if path.name != self.DATASET_METADATA_FILE)
            if len(request.files) != num_files:
                raise SystemExit(f"{len(request.files)} of {num_files} files could be uploaded")

    api = StrictApi()
    api.authenticate()
    existing = _get_dataset(api, name)
    if existing is not None and not existing.is_private:
        raise SystemExit(f"the data set {name} is public; give the name of a private or a new one")
    metadata = {"id": name, "title": name.split("/")[1], "licenses": [{"name": "other"}]}
    (folder / api.DATASET_METADATA_FILE).write_text(json.dumps(metadata))
    if existing is None:
        response = api.dataset_create_new(str(folder), public=False, quiet=True, dir_mode="tar")
    else:
        step = next((folder / "checkpoints").iterdir()).name
        response = api.dataset_create_version(str(folder), step, quiet=True, dir_mode="tar")
    if response is None or response.error or response.status.lower() == "error":
        raise SystemExit(f"Kaggle refused it: {response.error if response else 'no response'}")
    (folder / api.DATASET_METADATA_FILE).unlink()
    _wait_until_ready(api, name, existing.current_version_number if existing else 0)
    compare(sizes_of(folder), _list_files(api, name), ["checkpoints.tar"])


def _get_dataset(api, name):
    import requests
    from kagglesdk.datasets.types.dataset_api_service import ApiGetDatasetRequest

    request = ApiGetDatasetRequest()
    request.owner_slug, request.dataset_slug = name.split("/")
    try:
        with api.build_kaggle_client() as client:
            return client.datasets.dataset_api_client.get_dataset(request)
    except requests.exceptions.HTTPError as error:
        if error.response is not None and error.response.status_code in (403, 404):
            return None
        raise


def _wait_until_ready(api, name, previous_version):
    for poll in range(READY_POLLS):
        dataset = _get_dataset(api, name)
        if dataset is not None and dataset.current_version_number > previous_version:
            state = api.dataset_status(name)
            if state == "ready":
                return
            if state in ("failed", "deleted"):
                raise SystemExit(f"Kaggle could not process it ({state})")
        threading.Event().wait(min(POLL_S, 0.1 * 2**poll))
    raise SystemExit("Kaggle did not finish processing it")


def _list_files(api, name):
    sizes, page = {}, None
    while True:
        response = api.dataset_list_files(name, page_token=page, page_size=200)
        if response.error_message:
            raise SystemExit(f"listing its files failed: {response.error_message}")
        sizes |= {file.name: file.total_bytes for file in response.files}
        page = response.next_page_token
        if not page:
            return sizes


def to_hub(folder, name):
    """Commits a folder to the private repository `OWNER/NAME`. Raises SystemExit unless all files arrived."""
    import huggingface_hub

    api = huggingface_hub.HfApi(library_name="kdlib")
    api.create_repo(name, private=True, exist_ok=True)
    if not api.repo_info(name).private:
        raise SystemExit(f"the repository {name} is public; give the name of a private or a new one")
    sent = sizes_of(folder)

    def list_files():
        return {entry.path: entry.size for entry in api.list_repo_tree(name, recursive=True) if hasattr(entry, "size")}

    old = [path for path in list_files() if path.startswith("checkpoints/") and path not in sent]
    changes = [huggingface_hub.CommitOperationDelete(path) for path in old]
    changes += [huggingface_hub.CommitOperationAdd(path, folder / path) for path in sent]
    api.create_commit(name, changes, commit_message=next((folder / "checkpoints").iterdir()).name)
    compare(sent, list_files())


def sizes_of(folder):
    return {str(path.relative_to(folder)): path.stat().st_size for path in folder.rglob("*") if path.is_file()}


def compare(sent, received, archives=()):
    """Raises SystemExit unless all files `sent` (`{path: bytes}`) were `received` with the same sizes. An archive that
    was not unpacked stands for all files below the folder of its name. Some listings have file names without folders.
    """
    packed = [archive.rpartition(".")[0] + "/" for archive in archives if archive in received]
    for name, size in sent.items():
        arrived = received.get(name, received.get(name.rpartition("/")[2]))
        if arrived != size and not name.startswith(tuple(packed)):
            raise SystemExit(f"{name} {'is missing' if arrived is None else f'has {arrived} of {size} bytes'} there")


def _exit_with_parent():
    os.read(0, 1)  # sys.stdin would hold a lock at the interpreter's exit
    os._exit(1)


def main(kind, folder, name):
    """Uploads a folder. On failure it writes one line to stderr and exits with status 1."""
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    try:
        {"kaggle": to_kaggle, "hub": to_hub}[kind](Path(folder), name)
    except SystemExit as error:  # the client exits with 1 if it has no credentials
        sys.exit(error.code if isinstance(error.code, str) else "authentication failed: are the credentials valid?")
    except Exception as error:  # noqa: BLE001 - the parent process reads one line
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        sys.exit(": ".join([type(error).__name__, *lines[:1]]))


if __name__ == "__main__":
    main(*sys.argv[1:])
