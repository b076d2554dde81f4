"""README.md and docs/: length, links, commands, code, the generated configuration page and the site's navigation."""

import argparse
import ast
import contextlib
import importlib
import inspect
import io
import json
import re
import shlex
import sys
from pathlib import Path

import pytest
import yaml

from docs import configuration, hooks
from kdlib import cli
from kdlib.config import CONTROLS, DIVERGENCES, FEATURES, KD_METHODS, PRESETS, Config, flags

HOUSE = Path(__file__).parent.parent
sys.path.append(str(HOUSE / "kaggle"))

import pull  # noqa: E402
import push  # noqa: E402
import relay  # noqa: E402

README_LINES = 130
PAGES = [HOUSE / "README.md", HOUSE / "CONTRIBUTING.md", *sorted((HOUSE / "docs").glob("*.md"))]
SCRIPTS = {"push.py": push, "pull.py": pull, "relay.py": relay}
OTHER_FLAGS = {"--help", "--check", "--cpu", "--num_processes", "--nproc_per_node"}
"""Flags of other programs that the pages name outside of a block, and help: tests/refresh.py, accelerate, torchrun."""
KEYS = {name for name, _ in flags()} | {"preset"}
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.M | re.S)
LINK = re.compile(r"\]\(([^)\s]+)\)")
INLINE = re.compile(r"`([^`\n]+)`")
PAGE_IDS = [path.relative_to(HOUSE).as_posix() for path in PAGES]


def read(path):
    return path.read_text(encoding="utf-8")


def blocks(text, language):
    """The contents of the fenced blocks in a language."""
    return [content for name, content in FENCE.findall(text) if name == language]


def anchors(text):
    """The ids of a page's headings, as MkDocs and GitHub make them."""
    headings = re.findall(r"^#+ (.+)$", FENCE.sub("", text), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


def broken_links(text, folder):
    """Links and pictures of a page in `folder` whose file or heading does not exist."""
    broken = []
    for target in LINK.findall(FENCE.sub("", text)):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        path = folder / name if name else None
        if (path and not path.is_file()) or (anchor and anchor not in anchors(read(path) if path else text)):
            broken.append(target)
    return broken


def command_lines(text):
    """Each command of the shell blocks, as a list of words: continuation lines joined, comments and variables dropped."""
    for block in blocks(text, "bash"):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):
                words.pop(0)
            if words:
                yield words


def problem_of(words):
    """Why a command is wrong, or an empty string; commands of other programs are not looked at."""
    if words[0] == "torchrun":
        words = ["kdlib", *words[words.index("kdlib.cli") + 1 :]] if "kdlib.cli" in words else ["torchrun"]
    if words[0] == "kdlib":
        return kdlib_problem(words[1:])
    if words[0] == "python" and words[1].startswith("kaggle/"):
        return script_problem(SCRIPTS.get(Path(words[1]).name), words[2:])
    if words[0] == "python" and not words[1].startswith("-") and not (HOUSE / words[1]).is_file():
        return f"no file {words[1]}"
    if words[0] == "make":
        targets = set(re.findall(r"^([a-z-]+):", read(HOUSE / "Makefile"), re.M))
        return "" if set(words[1:]) <= targets else f"no such target: {words[1:]}"
    if words[:3] == ["pip", "install", "-r"]:
        return "" if (HOUSE / words[3]).is_file() else f"no file {words[3]}"
    if words[:2] == ["pip", "install"] and (extra := re.search(r"\[(\w+)\]", words[-1])):
        return "" if re.search(rf"^{extra[1]} = \[", read(HOUSE / "pyproject.toml"), re.M) else f"no extra {extra[1]}"
    return ""


def kdlib_problem(words):
    """Why the command line would refuse these words: it reads them, and the command itself is not run."""
    given, commands = [], dict(cli.COMMANDS)
    for name in commands:
        cli.COMMANDS[name] = lambda positional, options, name=name: given.append((name, positional, options)) or 0
    try:
        with contextlib.redirect_stderr(io.StringIO()) as said, contextlib.redirect_stdout(io.StringIO()):
            status = cli.main(words)
    finally:
        cli.COMMANDS.update(commands)
    if status or not given:
        return said.getvalue()
    command, positional, options = given[0]
    try:
        config = Config.from_dict({name: value for name, value in options.items() if name in KEYS})
        if command in ("distill", "cache") and not positional:
            config.require_inputs()
    except ValueError as error:
        return str(error)
    lacks_out = command in ("demo", "distill", "cache") and "out" not in options
    lacks_models = command == "evaluate" and not (config.teacher and config.student and config.dataset)
    wrong_count = len(positional) != 1 if command == "report" else len(positional) > 1
    return f"{command} lacks something or has too much" if lacks_out or lacks_models or wrong_count else ""


class Parsed(Exception):
    """Stops a script once it has read its options."""


def script_problem(script, words):
    """Why a script of kaggle/ would refuse these words, without sending anything."""
    if script is None:
        return "no such script"
    parse = argparse.ArgumentParser.parse_args

    def stop(parser, given=None, *_):
        raise Parsed(parse(parser, given))

    argparse.ArgumentParser.parse_args = stop
    try:
        script.run(words)
    except Parsed as parsed:
        options = parsed.args[0]
    except SystemExit:
        return f"{Path(script.__file__).name} does not take {words}"
    finally:
        argparse.ArgumentParser.parse_args = parse
    try:
        if script is not pull:
            push.checked(options)
    except ValueError as error:
        return str(error)
    return ""


def known_flags():
    """Every flag of kdlib and of the scripts, with hyphens."""
    own = {f"--{name}".replace("_", "-") for name in KEYS} | set(re.findall(r"--[a-z-]+", cli.USAGE))
    scripts = "".join(read(Path(script.__file__)) for script in SCRIPTS.values())
    own |= set(re.findall(r'add_argument\(\s*"(--[a-z-]+)"', scripts)) | {"--dataset", "--kernel-source", "--model"}
    return own | {"--no-internet", "--internet"}


def unknown_flags(text):
    """Flags in running text that no command has."""
    found = re.findall(r"(?<![\w-])--[a-z][\w-]*", " ".join(INLINE.findall(FENCE.sub("", text))))
    return sorted({flag for flag in found if flag.replace("_", "-") not in known_flags() and flag not in OTHER_FLAGS})


def inline_problems(text):
    """What is wrong with the commands of kdlib in running text: flags with values, and names of commands."""
    problems = []
    for code in INLINE.findall(FENCE.sub("", text)):
        if re.match(r"kdlib [a-z]", code):
            name = code.split()[1]
            problems += [] if name in cli.COMMANDS else [code]
        elif re.match(r"--[a-z][\w-]* \S", code):
            problem = _flag_problem(shlex.split(code))
            problems += [f"{code}: {problem}"] if problem else []
    return problems


def _flag_problem(words):
    """Why kdlib would refuse flags with values; flags of other programs are not looked at."""
    name = words[0].removeprefix("--").replace("-", "_")
    return kdlib_problem(["doctor", *words]) if name in KEYS else ""


def code_problem(code):
    """Why a block of Python is wrong, or an empty string: it must compile, and what it imports from kdlib must exist and
    take the keywords that it is given.
    """
    try:
        tree = ast.parse(code)
        names = dict(_imported(tree))
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in names:
                getattr(names[node.value.id], node.attr)
            if isinstance(node, ast.Call) and (called := _called(node.func, names)):
                inspect.signature(called).bind_partial(**{each.arg: None for each in node.keywords})
    except (SyntaxError, ImportError, AttributeError, TypeError) as error:
        return str(error)
    return ""


def _imported(tree):
    """`(name, object)` of what a block imports from kdlib."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, importlib.import_module("kdlib")) for alias in node.names if alias.name == "kdlib")
        if isinstance(node, ast.ImportFrom) and node.module.split(".")[0] == "kdlib":
            module = importlib.import_module(node.module)
            for alias in node.names:
                if not hasattr(module, alias.name):
                    importlib.import_module(f"{node.module}.{alias.name}")
                yield alias.asname or alias.name, getattr(module, alias.name)


def _called(func, names):
    """The object of kdlib that a call names, None for any other."""
    if isinstance(func, ast.Name):
        return names.get(func.id)
    if isinstance(func, ast.Attribute) and isinstance(func.value, ast.Name) and func.value.id in names:
        return getattr(names[func.value.id], func.attr)
    return None


def first_column(text, heading):
    """The code that begins each row of the table below a heading."""
    section = re.split(r"^#+ ", text, flags=re.M)
    (found,) = [part for part in section if part.startswith(f"{heading}\n")]
    return set(re.findall(r"^\| `(\w+)`[^|]* \|", found, re.M)) - {"kd_method", "control"}


def pages_in(nav):
    """The pages of a navigation, however deep."""
    if isinstance(nav, str):
        return [nav]
    parts = nav.values() if isinstance(nav, dict) else nav
    return [page for part in parts for page in pages_in(part)]


def nav_problems(nav, pages):
    """Pages that the navigation lacks, names twice or names without a file."""
    named = pages_in(nav)
    return sorted({*named} ^ {*pages}) + sorted({page for page in named if named.count(page) > 1})


def is_fresh(page):
    """Whether the text of the configuration page is what `Config` gives."""
    return page == configuration.page()


def test_readme_is_short():
    assert len(read(HOUSE / "README.md").splitlines()) <= README_LINES


@pytest.mark.parametrize("path", PAGES, ids=PAGE_IDS)
def test_links_lead_somewhere(path):
    assert broken_links(read(path), path.parent) == []


@pytest.mark.parametrize("path", PAGES, ids=PAGE_IDS)
def test_commands_parse(path):
    text = read(path)
    assert [(words, problem) for words in command_lines(text) if (problem := problem_of(words))] == []
    assert unknown_flags(text) == []
    assert inline_problems(text) == []


@pytest.mark.parametrize("path", PAGES, ids=PAGE_IDS)
def test_code_compiles_and_names_what_exists(path):
    text = read(path)
    assert [problem for code in blocks(text, "python") if (problem := code_problem(code))] == []
    assert all(json.loads(line) for code in blocks(text, "json") for line in code.splitlines())


@pytest.mark.parametrize("path", PAGES, ids=PAGE_IDS)
def test_brackets_are_quoted_for_zsh(path):
    assert not re.search(r"pip install [^\n`'\"]*\[", read(path))


@pytest.mark.parametrize("path", PAGES, ids=PAGE_IDS)
def test_every_block_names_its_language(path):
    assert {name for name, _ in FENCE.findall(read(path))} <= {"bash", "python", "json", "text"}


def test_configuration_page_is_fresh():
    assert is_fresh(read(configuration.PAGE)), "run python -m docs.configuration"


def test_tables_list_every_choice():
    methods, evaluation = (read(HOUSE / "docs" / name) for name in ("methods.md", "evaluation.md"))
    assert first_column(methods, "Which one to choose") == set(KD_METHODS)
    assert first_column(methods, "Feature losses") == set(FEATURES)
    assert first_column(evaluation, "The verdict") == set(CONTROLS)
    assert all(f"`{name}`" in methods for name in DIVERGENCES)
    assert all(f"--preset {name}`" in methods for name in PRESETS)


def test_navigation_lists_every_page():
    nav = yaml.safe_load(read(HOUSE / "mkdocs.yml"))["nav"]
    assert nav_problems(nav, [path.name for path in (HOUSE / "docs").glob("*.md")] + list(hooks.PAGES)) == []


def test_pages_from_elsewhere_link_to_pages_of_the_site():
    named = "[a](../benchmarks/RESULTS.md#self-test) [b](../CONTRIBUTING.md) ![c](../docs/quality.png)"
    assert hooks.link_to_site(named) == "[a](results.md#self-test) [b](contributing.md) ![c](quality.png)"
    assert all((HOUSE / source).is_file() for source in hooks.PAGES.values())


@pytest.mark.parametrize(
    "link", ["missing.md", "data.md#missing", "#missing", "../missing.png", "../benchmarks/RESULTS.md#missing"]
)
def test_a_broken_link_is_seen(link):
    page = f"# A\n\n[x](data.md#sources) [y](#a) [z](https://example.org) [w]({link})\n"
    assert broken_links(page, HOUSE / "docs") == [link]


@pytest.mark.parametrize(
    "line",
    [
        "kdlib distil --out run",
        "kdlib distill config.json",
        "kdlib distill --out run",
        "kdlib distill config.json --out run --kd-methd projector",
        "kdlib distill config.json --out run --kd-method projektor",
        "kdlib distill config.json --out run --batch-size 0",
        "kdlib cache config.json --out c \\\n    --max-steps many",
        "kdlib doctor a.json b.json",
        "kdlib report",
        "kdlib evaluate --teacher T --student S",
        "CPU=1 torchrun --nproc_per_node 2 -m kdlib.cli distill config.json",
        "python kaggle/push.py --param max_steps=3",
        "python kaggle/push.py --owner ann --param max_stpes=3",
        "python kaggle/relay.py --owner ann --out relay --follw",
        "python kaggle/pull.py ann/kdlib-distill",
        "python kaggle/poll.py ann/kdlib-distill",
        "python tests/refrsh.py --check",
        "make tests",
        "pip install -e '.[kagle]'",
        "pip install -r kagle/requirements.txt",
    ],
)
def test_a_wrong_command_is_seen(line, capsys):
    (words,) = command_lines(f"Text\n\n```bash\n{line}   # a comment\n```\n")
    assert problem_of(words)


def test_right_commands_pass():
    text = (
        "```bash\nkdlib demo --out a --kd-top-k 8\nCPU=1 torchrun -m kdlib.cli distill c.json --out a\nmake demo\n```\n"
    )
    assert [problem_of(words) for words in command_lines(text)] == ["", "", ""]


@pytest.mark.parametrize("code", ["--kd-topk", "kdlib distill --kd-topk 3", "python kaggle/push.py --drirun"])
def test_an_unknown_flag_in_running_text_is_seen(code):
    assert unknown_flags(f"Set `--kd-top-k 3` or `{code}`.")


@pytest.mark.parametrize("code", ["kdlib distil", "--batch-size none", "--packing sometimes"])
def test_a_wrong_command_in_running_text_is_seen(code):
    assert inline_problems(f"`kdlib doctor` and `--batch-size 4` and `{code}`") != []
    assert inline_problems("`kdlib doctor` and `--batch-size 4`") == []


@pytest.mark.parametrize(
    "code",
    [
        "for x in y\n    pass",
        "from kdlib import distil",
        "from kdlib.report import no_panel",
        "from kdlib import doctor\ndoctor.diagnos(1)",
        "from kdlib import Config\nConfig(batch=3)",
        "import kdlib\nkdlib.diagnos(1)",
        "import kdlib\nkdlib.LivePanel(folder='run')",
        "from kdlib import distill\ndistill(1, 'run', resum='auto')",
    ],
)
def test_wrong_code_is_seen(code):
    assert code_problem(code)
    right = "from kdlib import Config, distill\nfrom kdlib.report import panel\ndistill(Config(seed=1), 'a')\n"
    assert code_problem(right) == ""


def test_a_row_too_many_or_too_few_is_seen():
    table = "# A\n\n| `x` | 1 |\n|---|---|\n| `y` (default) | 2 |\n\n# B\n\n| `z` | 3 |\n"
    assert first_column(table, "A") == {"x", "y"}


def test_a_stale_configuration_page_is_seen(monkeypatch):
    page = configuration.page()
    assert is_fresh(page)
    assert not is_fresh(page.replace("Default: `384`", "Default: `385`"))
    texts = {**configuration.config.docstrings(), "seed": "Reworded."}
    monkeypatch.setattr(configuration.config, "docstrings", lambda: texts)
    assert not is_fresh(page)
    monkeypatch.setitem(configuration.GROUPS, "Averaged weights", "use_ema")
    with pytest.raises(ValueError, match="ema_decay"):
        configuration.page()


def test_a_changed_range_makes_the_page_stale(monkeypatch):
    page = configuration.page()
    monkeypatch.setitem(configuration.config._RANGES, "max_length", (5, 10**6))
    assert not is_fresh(page)


@pytest.mark.parametrize("pages", [["a.md", "b.md", "c.md"], ["a.md"]])
def test_a_page_missing_from_the_navigation_or_the_disk_is_seen(pages):
    nav = [{"A": "a.md"}, {"More": [{"B": "b.md"}]}]
    assert nav_problems(nav, ["a.md", "b.md"]) == []
    assert nav_problems(nav, pages)
    assert nav_problems([*nav, {"Again": "a.md"}], ["a.md", "b.md"]) == ["a.md"]


def test_a_block_without_a_language_is_seen():
    assert {name for name, _ in FENCE.findall("```\nkdlib\n```\n\n```bash\nkdlib\n```\n")} == {"", "bash"}
