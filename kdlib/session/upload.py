"""Sends one run folder to Kaggle or to the Hugging Face Hub, and looks whether all of it arrived: the process that `copies`
starts for each copy. The clients may print, exit and hang in it; what it has to say is its last line on stderr.

Kaggle keeps no folders in an upload: `checkpoints` goes as `checkpoints.tar`, which Kaggle unpacks into a folder of its name
when it takes it in, so that the mounted data set is the run folder. Versions of before stay, each taking its room. On the
Hub the folder is one commit, which removes the checkpoint of before from the newest state; the history keeps it.
"""

import json
import os
import sys
import threading
from pathlib import Path

READY_POLLS, POLL_S = 100, 10.0
"""How often, and at most how many seconds apart, a data set is asked for until Kaggle has taken it in."""
TIMEOUT_S = (30, 300)
"""Seconds to a connection, and of silence on one; Kaggle's client would wait for ever."""


def to_kaggle(folder, name):
    """Make the data set `OWNER/NAME` of a folder, or a version of it; SystemExit unless all of it is there afterwards."""
    import requests

    plain = requests.Session.send

    def send(self, request, **how):
        how["timeout"] = how.get("timeout") or TIMEOUT_S
        return plain(self, request, **how)

    requests.Session.send = send
    from kaggle.api.kaggle_api_extended import KaggleApi

    class Whole(KaggleApi):
        """The client, which in some versions makes data sets without files that it could not upload."""

        def upload_files(self, request, *more):
            super().upload_files(request, *more)
            wanted = sum(1 for path in folder.iterdir() if path.name != self.DATASET_METADATA_FILE)
            if len(request.files) != wanted:
                raise SystemExit(f"{len(request.files)} of {wanted} files could be uploaded")

    api = Whole()
    api.authenticate()
    there = _data_set(api, name)
    if there is not None and not there.is_private:
        raise SystemExit(f"the data set {name} is public; give the name of a private one, or of none yet")
    described = {"id": name, "title": name.split("/")[1], "licenses": [{"name": "other"}]}
    (folder / api.DATASET_METADATA_FILE).write_text(json.dumps(described))
    if there is None:
        answer = api.dataset_create_new(str(folder), public=False, quiet=True, dir_mode="tar")
    else:
        step = next((folder / "checkpoints").iterdir()).name
        answer = api.dataset_create_version(str(folder), step, quiet=True, dir_mode="tar")
    if answer is None or answer.error or answer.status.lower() == "error":
        raise SystemExit(f"Kaggle refused it: {answer.error if answer else 'no answer'}")
    (folder / api.DATASET_METADATA_FILE).unlink()
    _until_ready(api, name, there.current_version_number if there else 0)
    compare(sizes_of(folder), _listed(api, name), ["checkpoints.tar"])


def _data_set(api, name):
    """What Kaggle knows of a data set; None where there is none."""
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


def _until_ready(api, name, former):
    for poll in range(READY_POLLS):
        there = _data_set(api, name)
        if there is not None and there.current_version_number > former:
            state = api.dataset_status(name)
            if state == "ready":
                return
            if state in ("failed", "deleted"):
                raise SystemExit(f"Kaggle could not take it in ({state})")
        threading.Event().wait(min(POLL_S, 0.1 * 2**poll))
    raise SystemExit("Kaggle did not take it in")


def _listed(api, name):
    found, page = {}, None
    while True:
        answer = api.dataset_list_files(name, page_token=page, page_size=200)
        if answer.error_message:
            raise SystemExit(f"its files could not be listed: {answer.error_message}")
        found |= {file.name: file.total_bytes for file in answer.files}
        page = answer.next_page_token
        if not page:
            return found


def to_hub(folder, name):
    """One commit of a folder into the private repository `OWNER/NAME`; SystemExit unless all of it is there afterwards."""
    import huggingface_hub

    api = huggingface_hub.HfApi(library_name="kdlib")
    api.create_repo(name, private=True, exist_ok=True)
    if not api.repo_info(name).private:
        raise SystemExit(f"the repository {name} is public; give the name of a private one, or of none yet")
    sent = sizes_of(folder)

    def there():
        return {entry.path: entry.size for entry in api.list_repo_tree(name, recursive=True) if hasattr(entry, "size")}

    old = [path for path in there() if path.startswith("checkpoints/") and path not in sent]
    changes = [huggingface_hub.CommitOperationDelete(path) for path in old]
    changes += [huggingface_hub.CommitOperationAdd(path, folder / path) for path in sent]
    api.create_commit(name, changes, commit_message=next((folder / "checkpoints").iterdir()).name)
    compare(sent, there())


def sizes_of(folder):
    return {str(path.relative_to(folder)): path.stat().st_size for path in folder.rglob("*") if path.is_file()}


def compare(sent, there, archives=()):
    """SystemExit unless all files `sent` (`{name: bytes}`) are `there` with their sizes. One of `archives` stands for what
    lies below the folder of its name, where it is listed as it was sent; some lists leave out the folders of a name.
    """
    packed = [archive.rpartition(".")[0] + "/" for archive in archives if archive in there]
    for name, size in sent.items():
        found = there.get(name, there.get(name.rpartition("/")[2]))
        if found != size and not name.startswith(tuple(packed)):
            raise SystemExit(f"{name} {'is missing' if found is None else f'has {found} of {size} bytes'} there")


def _end_with_parent():
    os.read(0, 1)  # not through sys.stdin, whose lock would not let the interpreter end
    os._exit(1)


def main(kind, folder, name):
    """Send a folder. One line on stderr and exit status 1 where that failed."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        {"kaggle": to_kaggle, "hub": to_hub}[kind](Path(folder), name)
    except SystemExit as error:  # 1 is the client's way to say that it has no credentials
        sys.exit(error.code if isinstance(error.code, str) else "the client was not let in: are the credentials valid?")
    except Exception as error:  # noqa: BLE001 - one line, for the process that waits
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        sys.exit(": ".join([type(error).__name__, *lines[:1]]))


if __name__ == "__main__":
    main(*sys.argv[1:])
