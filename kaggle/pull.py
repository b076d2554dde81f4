"""Download the outputs of a kernel version, completely or not at all.

    python kaggle/pull.py NAME/kdlib-distill --out folder [--version 3] [--without checkpoints/]

The kernel's log is saved as `folder.log`. Exit status: 0 success, 1 refused by Kaggle, 2 invalid input.
"""

import argparse
import re
import sys
from pathlib import Path

from client import Client, main_of


def pull(client, ref, version, out, without=""):
    """Downloads outputs of a version (None: the newest) unless their names match `without`. Returns their number."""
    out = Path(out)
    if out.exists():
        raise ValueError(f"--out {out} exists; give a new folder")
    files, log = client.outputs(ref, version)
    files = [(name, url) for name, url in files if not (without and re.search(without, name))]
    if not files:
        raise ValueError(f"{ref} has no output files; only versions with status COMPLETE keep them")
    for done, total, name in client.fetch(files, out):
        if done % 20 == 0:
            client.say(f"{done} of {total} files; {name}")
    if log:
        out.with_name(out.name + ".log").write_text(log, encoding="utf-8")
    return len(files)


def run(words=None):
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    options.add_argument("kernel", help="owner/slug")
    options.add_argument("--out", required=True, help="a new folder")
    options.add_argument("--version", type=int, help="default: the newest")
    options.add_argument("--without", default="", metavar="REGEX", help="skip outputs whose names match")
    options = options.parse_args(words)
    if not re.fullmatch(r"[\w-]+/[\w-]+", options.kernel):
        raise ValueError(f"a kernel is owner/slug, as in its URL; got {options.kernel!r}")
    try:
        re.compile(options.without)
    except re.error as error:
        raise ValueError(f"--without {options.without!r} is not a regular expression: {error}") from None
    num_files = pull(Client(), options.kernel, options.version, options.out, options.without)
    print(f"{num_files} files downloaded to {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main_of(run))
