"""Push the notebook to Kaggle, with parameters and the kdlib package embedded.

    python kaggle/push.py --owner NAME --param teacher=Qwen/Qwen3-0.6B --param student=HuggingFaceTB/SmolLM2-135M \\
        --param dataset=NAME/texts --param max_steps=2000 [--dataset NAME/texts] [--no-internet] [--timeout 12h]
        [--dry-run]

A parameter is a name in the notebook's parameters cell, or a key of `kdlib distill` (`python -m kdlib.cli --help` lists
them). Exit status: 0 success, 1 refused by Kaggle, 2 invalid input (nothing was pushed).
"""

import argparse
import json
import math
import secrets
import sys
import tempfile
from pathlib import Path

import kernel
from client import Client, main_of

from kdlib import clock


def parser(description):
    """Returns a parser with the options that `relay.py` shares."""
    options = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    options.add_argument("--owner", required=True, help="your Kaggle user name, as in kaggle.com/NAME")
    options.add_argument("--slug", default="", help="the kernel's name in its URL (default: from the title)")
    options.add_argument("--title", default="", help="default: kdlib and the notebook's name")
    options.add_argument("--notebook", default=str(kernel.ROOT / "notebooks" / "distill.ipynb"))
    options.add_argument("--param", action="append", default=[], metavar="NAME=VALUE")
    options.add_argument(
        "--accelerator", default="NvidiaTeslaT4", help="; ".join(map(": ".join, kernel.ACCELERATORS.items()))
    )
    options.add_argument("--internet", action=argparse.BooleanOptionalAction, default=True)
    for name, form in (("dataset", "owner/name"), ("kernel-source", "owner/name"), ("model", "its five parts")):
        options.add_argument(f"--{name}", action="append", default=[], metavar=form, help="to attach; may be repeated")
    options.add_argument("--docker-image", default="", help="docker_image in the output of `kaggle kernels pull -m`")
    options.add_argument("--timeout", default="", metavar="6h", help="session timeout (default: Kaggle's limit, 12h)")
    options.add_argument("--public", action="store_true", help="make the kernel public")
    return options


def prepared(options, token, sources=(), budget_s=math.inf):
    """Returns `(notebook, metadata, timeout_s)` to push. Raises ValueError for invalid options."""
    values, metadata, timeout_s = checked(options, sources, budget_s)
    stamp = {"token": token, "version": kernel.kdlib.__version__, "accelerator": options.accelerator}
    return kernel.build(options.notebook, values, stamp), metadata, timeout_s


def checked(options, sources=(), budget_s=math.inf):
    """Returns `(parameters, metadata, timeout_s)` of the options. Raises ValueError for invalid options."""
    path = Path(options.notebook)
    if not (options.title or options.slug):
        options.title = f"kdlib {path.stem.replace('_', ' ')}"
    timeout_s = session_timeout_s(options.timeout)
    metadata = kernel.metadata_of(options, sources)
    try:
        defaults = kernel.parameters_of(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, KeyError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is not a readable notebook: {error}") from None
    values = kernel.typed(split_pairs(options.param), defaults)
    if "accelerator" in defaults:
        values.setdefault("accelerator", options.accelerator.replace("none", ""))
    if "time_budget" in defaults:
        values["time_budget"] = _time_budget({**defaults, **values}, kernel.max_budget_s(timeout_s), budget_s)
    kernel.require_kept(values.get("out", defaults.get("out", "")))
    return values, metadata, timeout_s


def session_timeout_s(text):
    """Returns a session timeout in seconds, or None for Kaggle's limit. Raises ValueError if it has no unit or is longer."""
    if not text:
        return None
    if not text[-1].isalpha():  # hours for kdlib, seconds for the original client
        raise ValueError(f"--timeout takes a duration with a unit, such as 6h, 90m or 3600s; got {text!r}")
    try:
        seconds = round(clock.parse_duration(text))
    except ValueError as error:
        raise ValueError(str(error).replace("time_budget", "--timeout")) from None
    if seconds > kernel.SESSION_S:
        limit = clock.format_duration(kernel.SESSION_S)
        raise ValueError(f"--timeout {text} is longer than a session on Kaggle: at most {limit}")
    return seconds


def _time_budget(parameters, limit_s, budget_s):
    """Returns the time budget of a session: that of the parameters, but at most `budget_s` and `limit_s`."""
    given = parameters["time_budget"]
    if parameters.get("settings", {}).get("time_budget"):
        raise ValueError("settings has a time_budget; give --param time_budget instead")
    given_s = clock.parse_duration(given)
    if limit_s < given_s < math.inf:
        limit = clock.format_duration(limit_s)
        raise ValueError(f"time_budget {given!r} is longer than this session allows: at most {limit}")
    return f"{min(given_s, limit_s, budget_s):.0f}s"


def warn(options):
    """Prints a warning about the accelerator if there is one."""
    if warning := kernel.accelerator_warning(options.accelerator):
        print(f"warning: {warning}", file=sys.stderr)


def split_pairs(pairs):
    """Returns `{name: text}` of `name=text` pairs."""
    texts = {}
    for pair in pairs:
        name, equals, text = pair.partition("=")
        if not equals or not name.strip():
            raise ValueError(f"--param takes name=value, got {pair!r}")
        if name in texts:
            raise ValueError(f"--param {name} is given twice: {texts[name]!r} and {text!r}")
        texts[name.strip()] = text
    return texts


def run(words=None):
    options = parser(__doc__)
    options.add_argument("--dry-run", action="store_true", help="build and validate, push nothing")
    options.add_argument("--folder", default="", help="keep the pushed files in this folder")
    options = options.parse_args(words)
    token = secrets.token_hex(8)
    notebook, metadata, timeout_s = prepared(options, token)
    warn(options)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(options.folder or temporary)
        kernel.write(folder, notebook, metadata)
        if options.dry_run:
            size = (folder / metadata["code_file"]).stat().st_size
            shown = {"session_timeout_s": timeout_s or kernel.SESSION_S, "parameters": kernel.parameters_of(notebook)}
            print(json.dumps({**metadata, **shown, "bytes": size}, indent=2))
            return 0
        pushed = Client().push(folder, token, timeout_s)
    print(f"Version {pushed.version} was pushed and will run: {pushed.url}")
    return 0


if __name__ == "__main__":
    sys.exit(main_of(run))
