"""Push the notebook to Kaggle, with parameters and the kdlib package embedded.

    python kaggle/push.py --owner NAME --param teacher=Qwen/Qwen3-0.6B --param student=HuggingFaceTB/SmolLM2-135M \\
        --param dataset=NAME/texts --param max_steps=2000 [--dataset NAME/texts] [--no-internet] [--timeout 12h]
        [--dry-run]

A parameter is a name in the notebook's parameters cell, or a key of `kdlib distill` (`python -m kdlib.cli --help` lists
them). Exit status: 0 success, 1 refused by Kaggle, 2 invalid input (nothing was pushed).
"""

import argparse
import json
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
    options.add_argument("--title", default="", help="default: kdlib distill")
    options.add_argument("--notebook", default=str(kernel.ROOT / "notebooks" / "distill.ipynb"))
    options.add_argument("--param", action="append", default=[], metavar="NAME=VALUE")
    options.add_argument(
        "--accelerator", default="NvidiaTeslaT4", help="; ".join(map(": ".join, kernel.ACCELERATORS.items()))
    )
    options.add_argument("--internet", action=argparse.BooleanOptionalAction, default=True)
    for name, form in (("dataset", "owner/name"), ("kernel-source", "owner/name"), ("model", "its five parts")):
        options.add_argument(f"--{name}", action="append", default=[], metavar=form, help="to attach; may be repeated")
    options.add_argument("--docker-image", default="", help="docker_image in the output of `kaggle kernels pull -m`")
    options.add_argument("--timeout", default="", metavar="12h", help="session timeout (default: Kaggle's limit)")
    options.add_argument("--public", action="store_true", help="make the kernel public")
    return options


def prepared(options, token, sources=(), budget_s=None):
    """Returns `(notebook, metadata, timeout_s)` to push. Raises ValueError for invalid options."""
    values, metadata, timeout_s = checked(options, sources, budget_s)
    stamp = {"token": token, "version": kernel.kdlib.__version__, "accelerator": options.accelerator}
    return kernel.build(options.notebook, values, stamp), metadata, timeout_s


def checked(options, sources=(), budget_s=None):
    """Returns `(parameters, metadata, timeout_s)` of the options. Raises ValueError for invalid options."""
    if not (options.title or options.slug):
        options.title = "kdlib distill"
    timeout_s = _timeout_s(options.timeout)
    metadata = kernel.metadata_of(options, sources)
    path = Path(options.notebook)
    try:
        defaults = kernel.parameters_of(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, KeyError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is not a readable notebook: {error}") from None
    values = kernel.typed(split_pairs(options.param), defaults)
    if "accelerator" in defaults and options.accelerator != "none":
        values.setdefault("accelerator", options.accelerator)
    if "time_budget" in defaults and (budget_s or not values.get("time_budget")):
        values["time_budget"] = f"{budget_s:.0f}s" if budget_s else kernel.time_budget(timeout_s)
    return values, metadata, timeout_s


def _timeout_s(text):
    try:
        return round(clock.parse_duration(text)) if text else None
    except ValueError as error:
        raise ValueError(str(error).replace("time_budget", "--timeout")) from None


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
    if options.accelerator == "NvidiaTeslaP100":
        print(f"warning: NvidiaTeslaP100 is {kernel.ACCELERATORS['NvidiaTeslaP100']}.", file=sys.stderr)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(options.folder or temporary)
        kernel.write(folder, notebook, metadata)
        if options.dry_run:
            size = (folder / metadata["code_file"]).stat().st_size
            print(json.dumps({**metadata, "parameters": kernel.parameters_of(notebook), "bytes": size}, indent=2))
            return 0
        pushed = Client().push(folder, token, timeout_s)
    print(f"Version {pushed.version} was pushed and will run: {pushed.url}")
    return 0


if __name__ == "__main__":
    sys.exit(main_of(run))
