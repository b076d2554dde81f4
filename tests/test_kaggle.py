"""Pushing, fetching and relaying with the real client, both versions of it, against a Kaggle of our own."""

import base64
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

HOUSE = Path(__file__).parent.parent
sys.path.append(str(HOUSE / "kaggle"))
BOTH = pytest.mark.parametrize("version", ["2.2.4", "2.2.5"])
pytest.importorskip("kagglesdk", reason="the client needs Python 3.11")

import kaggle_server  # noqa: E402
import kernel  # noqa: E402
import push  # noqa: E402
from kaggle_server import CLIENTS, command, files_of, pushes, wait_until  # noqa: E402

FIRST = ["--owner", "ann", "--param", "max_steps=7"]


def parameters_of(request):
    return kernel.parameters_of(json.loads(request["text"]))


# what is sent


def test_the_package_is_the_same_for_the_same_source():
    first = kernel.package()
    kernel.package.cache_clear()
    assert kernel.package() == first


def test_a_built_kernel_has_no_outputs_and_all_it_needs(tmp_path):
    built = kernel.build(HOUSE / "notebooks" / "distill.ipynb", {"out": "other"}, {"token": "t"})
    code = [cell for cell in built.cells if cell.cell_type == "code"]
    assert all(cell.outputs == [] and cell.execution_count is None for cell in code)
    assert built.metadata.kernelspec.name == "python3"
    assert set(built.metadata) == {"kernelspec", "language_info"}
    assert [cell.metadata.tags for cell in code[:2]] == [["parameters"], ["kdlib"]]
    assert "out = 'other'  # run folder; an interrupted run" in code[0].source
    assert 'resume = "auto"  # auto:' in code[0].source
    assert len(json.dumps(built)) < 400_000


def test_a_built_kernel_can_be_built_again(tmp_path):
    import nbformat

    once = kernel.build(HOUSE / "notebooks" / "distill.ipynb", {"out": "a", "resume": "never"}, {})
    once.cells.insert(2, nbformat.v4.new_code_cell("out = 'c'", metadata={"tags": ["injected-parameters"]}))
    nbformat.write(once, tmp_path / "once.ipynb")
    twice = kernel.build(tmp_path / "once.ipynb", {"out": "b"}, {})
    assert kernel.parameters_of(twice)["out"] == "b"
    assert kernel.parameters_of(twice)["resume"] == "never"
    assert not [cell for cell in twice.cells if "injected-parameters" in cell.metadata.get("tags", [])]


def test_a_fork_that_changes_its_first_cell_is_obeyed(tmp_path):
    import nbformat

    fork = kernel.build(HOUSE / "notebooks" / "distill.ipynb", {"out": "pushed", "teacher_steps": 7}, {})
    del fork.cells[3:]
    fork.cells[1].source = fork.cells[1].source.replace("'pushed'", "'forked'")
    fork.cells.append(nbformat.v4.new_code_cell("print(out, teacher_steps)"))
    nbformat.write(fork, tmp_path / "fork.ipynb")
    words = [sys.executable, "-m", "papermill", "fork.ipynb", "ran.ipynb", "--no-progress-bar"]
    ran = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert nbformat.read(tmp_path / "ran.ipynb", 4).cells[-1].outputs[0].text == "forked 7\n"


def test_only_the_values_of_a_parameters_cell_are_replaced():
    source = 'a = "é = 1"  # a = 2\nb = {\n    "x": 1,  # inside\n}  # after\nc = (0, 1)\nd = ""  # "d"'
    expected = "a = [1]  # a = 2\nb = {'y': 'é'}  # after\nc = (0, 1)\nd = 'x\\n'  # \"d\""
    assert kernel.with_parameters(source, {"b": {"y": "é"}, "a": [1], "d": "x\n"}) == expected


def run_cell(source, folder):
    """The cell in an interpreter that has no kdlib of its own."""
    told = "\nimport kdlib, importlib.metadata\nprint(kdlib.__file__, importlib.metadata.version('kdlib'))\n"
    (folder / "cell.py").write_text(source + told)
    environment = {**os.environ, "TMPDIR": str(folder), "PYTHONPATH": ""}
    words = [sys.executable, "-I", "-S", "cell.py"]
    return subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True)


def test_the_carrying_cell_brings_kdlib_and_leaves_its_stamp(tmp_path):
    ran = run_cell(kernel.carrying_cell({"token": "abc"}), tmp_path)
    assert ran.returncode == 0, ran.stderr
    path, version = ran.stdout.split()
    assert Path(path).is_relative_to(tmp_path) and version == kernel.kdlib.__version__
    assert json.loads((tmp_path / "kernel.json").read_text()) == {"token": "abc"}
    house, carried = HOUSE / "kdlib", Path(path).parent
    for ending in ("*.py", "*.html.j2"):
        ours = {path.relative_to(house): path.read_bytes() for path in house.rglob(ending)}
        assert ours
        assert {path.relative_to(carried): path.read_bytes() for path in carried.rglob(ending)} == ours
    assert run_cell(kernel.carrying_cell({"token": "abc"}), tmp_path).returncode == 0  # a kernel restarted


def test_a_changed_carrying_cell_says_so(tmp_path):
    source = kernel.carrying_cell({})
    start = source.index('PACKED = """') + 500
    other = "A" if source[start] != "A" else "B"
    ran = run_cell(source[:start] + other + source[start + 1 :], tmp_path)
    assert ran.returncode == 1
    assert ran.stderr.startswith("The cell with the kdlib package was changed")


PAIR = {"teacher": "a/b", "student": "c/d", "dataset": "text.jsonl"}


def typed(notebook="distill", **texts):
    known = kernel.parameters_of(json.loads((HOUSE / "notebooks" / f"{notebook}.ipynb").read_text()))
    return kernel.typed(texts, known)


def test_parameters_take_the_type_they_have_in_the_notebook():
    assert typed(teacher_steps="20", out="1") == {"teacher_steps": 20, "out": "1"}
    assert typed("teacher_cache", writer="(1, 3)") == typed("teacher_cache", writer="1, 3") == {"writer": (1, 3)}
    assert typed("losses_compared", methods="['projector']") == {"methods": ["projector"]}
    assert typed("losses_compared", parts="{'contrastive_weight': 0.1}") == {"parts": {"contrastive_weight": 0.1}}
    assert typed(**{"kd-top-k": "64", "use_ema": "true"}) == {"settings": {"kd_top_k": 64, "use_ema": True}}
    assert typed(settings="{'max_steps': 3}", seed="4") == {"settings": {"max_steps": 3, "seed": 4}}


@pytest.mark.parametrize(
    ("texts", "says"),
    [
        ({"teacher_steps": "many"}, "takes a whole number, such as 200; got 'many'"),
        ({"taecher": "a/b"}, "did you mean 'teacher'?"),
        ({"max_stpes": "3"}, "did you mean 'max_steps'?"),
        ({"kd_method": "projektor"}, "did you mean 'projector'?"),
        ({"max_length": "1"}, "max_length is 1"),
        ({"settings": "[1]"}, "takes {'key': value}"),
        ({"settings": "{'max_stpes': 3}"}, "did you mean 'max_steps'?"),
        ({"time_budget": "soon"}, "time_budget takes hours"),
        ({"notebook": "teacher_cache", "writer": "1"}, "--param writer takes a tuple, such as (0, 1); got '1'"),
        ({"notebook": "teacher_cache", "writer": "(1, 2, 3)"}, "takes a tuple, such as (0, 1); got '(1, 2, 3)'"),
        ({"notebook": "teacher_cache", "writer": "('a', 2)"}, "takes a tuple, such as (0, 1)"),
        (
            {"notebook": "losses_compared", "methods": "projector"},
            "takes a list, such as ['byte_prefix', 'first_token']",
        ),
        ({"notebook": "losses_compared", "methods": "[1]"}, "takes a list, such as ['byte_prefix', 'first_token']"),
        ({"notebook": "losses_compared", "parts": "[[]" * 9000}, "takes {'key': value}"),
        ({"student": "a/b"}, "teacher is missing: a run takes teacher, student and dataset"),
        ({"dataset": "a.jsonl", "teacher": "a/b"}, "student is missing"),
        ({"notebook": "losses_compared", "teacher": "a/b", "student": "c/d"}, "dataset is missing"),
    ],
)
def test_a_wrong_parameter_is_told_before_anything_is_sent(texts, says):
    with pytest.raises(ValueError) as told:
        typed(**texts)
    assert says in str(told.value)


@pytest.mark.parametrize(("notebook", "slug"), [("distill", "kdlib-distill"), ("teacher_cache", "kdlib-teacher-cache")])
def test_a_kernel_has_the_name_of_its_notebook(capsys, notebook, slug):
    assert push.run(["--owner", "ann", "--dry-run", "--notebook", str(HOUSE / "notebooks" / f"{notebook}.ipynb")]) == 0
    assert json.loads(capsys.readouterr().out)["id"] == f"ann/{slug}"


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--timeout", "3600"], "--timeout takes a duration with a unit, such as 6h, 90m or 3600s; got '3600'"),
        (["--timeout", "2"], "--timeout takes a duration with a unit"),
        (["--timeout", "soon"], "--timeout takes"),
        (["--timeout", "13h"], "--timeout 13h is longer than a session on Kaggle: at most 12 h"),
        (["--param", "time_budget=20h"], "time_budget '20h' is longer than this session allows: at most 11 h"),
        (["--param", "time_budget=39600"], "time_budget '39600' is longer than this session allows: at most 11 h"),
        (["--param", "time_budget=3h", "--timeout", "2h"], "time_budget '3h' is longer than this session allows"),
        (["--param", "settings={'time_budget': '20h'}"], "give --param time_budget"),
        (["--param", "out=/kaggle/temp/run"], "out '/kaggle/temp/run' is outside /kaggle/working"),
        (["--param", "out=../run"], "out '../run' is outside /kaggle/working"),
        (["--param", "out=/kaggle/working/../run"], "is outside /kaggle/working"),
    ],
)
def test_a_value_that_would_lose_the_session_is_refused(words, says):
    with pytest.raises(ValueError) as told:
        push.run(["--owner", "ann", "--dry-run", *words])
    assert says in str(told.value)


@pytest.mark.parametrize(
    ("words", "timeout_s", "budget", "out"),
    [
        ([], 43200, "39600s", "run"),
        (["--timeout", "90m", "--param", "out=/kaggle/working/a/../b"], 5400, "4860s", "/kaggle/working/a/../b"),
        (["--timeout", "6h", "--param", "time_budget=40m"], 21600, "2400s", "run"),
    ],
)
def test_a_dry_run_shows_the_times_and_the_folder(capsys, words, timeout_s, budget, out):
    push.run(["--owner", "ann", "--dry-run", *words])
    sent = json.loads(capsys.readouterr().out)
    told = sent["session_timeout_s"], sent["parameters"]["time_budget"], sent["parameters"]["out"]
    assert told == (timeout_s, budget, out)


def test_a_budget_in_the_first_cell_is_kept(tmp_path):
    import nbformat

    edited = kernel.build(HOUSE / "notebooks" / "distill.ipynb", {"time_budget": "40m"}, {})
    nbformat.write(edited, tmp_path / "edited.ipynb")
    options = push.parser("").parse_args(["--owner", "ann", "--notebook", str(tmp_path / "edited.ipynb")])
    assert push.checked(options)[0]["time_budget"] == "2400s"
    assert push.checked(options, budget_s=60.0)[0]["time_budget"] == "60s"
    assert push.checked(options, budget_s=9000.0)[0]["time_budget"] == "2400s"


@pytest.mark.parametrize(("timeout", "left"), [("", "39600s"), ("12h", "39600s"), ("60s", "54s"), ("2h", "6480s")])
def test_a_session_ends_itself_before_kaggle_does(timeout, left):
    options = push.parser("").parse_args(["--owner", "ann", "--timeout", timeout])
    notebook, *_ = push.prepared(options, "t")
    assert kernel.parameters_of(notebook)["time_budget"] == left


WORDS = st.text(st.characters(codec="utf-8", exclude_characters="\x00"), max_size=12) | st.sampled_from(
    [
        "ann",
        "kdlib-distill",
        "a/b",
        "a/b/c/d/1",
        "NvidiaTeslaT4",
        "12h",
        "max_steps=3",
        "teacher=a/b",
        "seed=x",
        "-",
        "kd=1=2",
    ]
)
SOUND = {
    "--slug": ["my-run", "kdlib-distill"], "--param": ["max_steps=3", "teacher=a/b", "out=other", "kd-top-k=8", "small={}"],
    "--accelerator": ["NvidiaTeslaT4", "NvidiaTeslaP100", "none", "NvidiaL4"], "--dataset": ["ann/texts", "b/c"],
    "--kernel-source": ["ann/other-run"], "--model": ["q/qwen/transformers/0.6b/1"], "--timeout": ["12h", "90s", "2"],
    "--docker-image": ["gcr.io/kaggle/python@sha256:" + "a" * 64], "--title": ["My run", "kdlib distill"],
}  # fmt: skip
PAIRS = st.sampled_from(sorted(SOUND)).flatmap(
    lambda flag: st.tuples(
        st.just(flag), st.integers(0, 5).flatmap(lambda n: WORDS if n == 0 else st.sampled_from(SOUND[flag]))
    )
)


@settings(max_examples=300, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(st.lists(PAIRS, max_size=4), st.integers(0, 9))
def test_whatever_is_asked_for_makes_a_sound_kernel_or_one_clear_line(capsys, pairs, named):
    words = ["--owner", "ann"] * (named > 0) + [f"{flag}={word}" for flag, word in pairs]
    try:
        assert push.run([*words, "--dry-run"]) == 0
    except ValueError as error:
        assert str(error) and "\n" not in str(error)
        return
    except SystemExit as ended:
        assert ended.code == 2
        return
    finally:
        told = capsys.readouterr().out
    sent = json.loads(told)
    owner, slug = sent["id"].split("/")
    assert owner and 5 <= len(slug) <= 50 and slug == slug.lower()
    for flag, field in (
        ("--dataset", "dataset_sources"),
        ("--kernel-source", "kernel_sources"),
        ("--model", "model_sources"),
    ):
        assert sent[field] == [word for name, word in pairs if name == flag]
    assert sent.get("machine_shape", "none") == ([w for f, w in pairs if f == "--accelerator"] or ["NvidiaTeslaT4"])[-1]
    assert sent["enable_internet"] is True and sent["is_private"] is True
    assert sent["parameters"]["time_budget"]


# push


PUSH_ONLY = """
import sys
sys.modules.update(dict.fromkeys({blocked!r}))
sys.path.insert(0, {folder!r})
import client, push
sys.exit(client.main_of(lambda: push.run({words!r})))
"""


def test_a_push_needs_the_requirements_of_its_folder_only(server, tmp_path):
    wanted = (HOUSE / "kaggle" / "requirements.txt").read_text().split()
    assert wanted == ["kaggle>=2.2.4", "six", "nbformat"]
    extra = re.search(r"^kaggle = \[(.*)\]$", (HOUSE / "pyproject.toml").read_text(), re.M)[1]
    assert [name.split(";")[0] for name in re.findall(r'"(.+?)"', extra)] == wanted
    packages = (HOUSE / "requirements.txt").read_text().split()
    blocked = [re.split("[<>=]", line)[0] for line in packages if line != "tqdm"]  # the client needs tqdm
    code = PUSH_ONLY.format(blocked=[*blocked, "papermill", "pandas"], folder=str(HOUSE / "kaggle"), words=FIRST)
    environment = {**server.environment(tmp_path / "home"), "PYTHONPATH": str(CLIENTS["2.2.5"])}
    words = [sys.executable, "-c", code]
    ran = subprocess.run(words, env=environment, capture_output=True, text=True, cwd=tmp_path)
    assert ran.stdout.startswith("Version 1 was pushed"), ran.stderr


def test_a_missing_package_of_the_client_is_one_line(server, tmp_path):
    ran = command(server, tmp_path, "push", FIRST, more="sys.modules['six'] = None")
    assert (ran.returncode, ran.stderr.count("\n")) == (2, 1)
    assert "pip install -r kaggle/requirements.txt" in ran.stderr


@BOTH
def test_a_push_sends_what_was_asked_for(server, tmp_path, version):
    words = [
        *FIRST, "--param", "kd-top-k=32", "--dataset", "ann/texts", "--model", "q/qwen/transformers/0.6b/1",
        "--timeout", "2h", "--no-internet", "--docker-image", "gcr.io/kaggle/python@sha256:" + "0" * 64, "--title", "My run",
    ]  # fmt: skip
    ran = command(server, tmp_path, "push", words, version)
    assert (ran.returncode, ran.stdout.count("Version 1 was pushed")) == (0, 1), ran.stderr
    (request,) = pushes(server)
    assert (request["slug"], request["newTitle"]) == ("ann/my-run", "My run")
    assert (request["language"], request["kernelType"], request["isPrivate"]) == ("python", "notebook", True)
    assert (request["enableGpu"], request["machineShape"]) == (True, "NvidiaTeslaT4")
    assert (request.get("enableInternet", False), request["sessionTimeoutSeconds"]) == (False, 7200)
    assert request["datasetDataSources"] == ["ann/texts"] and request["modelDataSources"] == [
        "q/qwen/transformers/0.6b/1"
    ]
    assert request["dockerImage"].startswith("gcr.io/kaggle/python@sha256:")
    told = parameters_of(request)
    assert told["settings"] == {"max_steps": 7, "kd_top_k": 32} and told["accelerator"] == "NvidiaTeslaT4"
    assert told["time_budget"] == "6480s"


@BOTH
@pytest.mark.parametrize("fault", ["429", "500", "html", "drop", "drop after"])
def test_one_version_is_made_whatever_happens_to_the_answer(server, tmp_path, version, fault):
    server.faults["SaveKernel"] = [fault]
    ran = command(server, tmp_path, "push", FIRST, version)
    assert ran.returncode == 0, ran.stderr
    assert "Version 1 was pushed" in ran.stdout
    assert len(server.kernels["ann/kdlib-distill"]) == 1


def test_a_push_that_never_gets_an_answer_ends_with_one_line(server, tmp_path):
    server.faults["SaveKernel"] = ["500"] * 20
    ran = command(server, tmp_path, "push", FIRST)
    assert (ran.returncode, ran.stderr) == (
        1, "kaggle: ann/kdlib-distill could not be pushed in 6 attempts; no new version was found\n",
    )  # fmt: skip
    assert len(pushes(server)) == 6


@BOTH
def test_a_refused_push_is_no_success(server, tmp_path, version):
    server.errors = ["Notebook title is already in use."]
    ran = command(server, tmp_path, "push", FIRST, version)
    assert (ran.returncode, ran.stderr) == (1, "kaggle: Kaggle refused the push: Notebook title is already in use.\n")
    assert "Version" not in ran.stdout


@BOTH
@pytest.mark.parametrize("fault", ["", "drop after"])
@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("Dataset", ["--dataset", "ann/typo"]),
        ("Kernel", ["--kernel-source", "ann/typo-run"]),
        ("Model", ["--model", "ann/typo/transformers/1b/1"]),
    ],
)
def test_a_source_that_kaggle_does_not_find_is_no_success(server, tmp_path, version, fault, kind, words):
    server.invalid = {f"invalid{kind}Sources": words[1:]}
    server.faults["SaveKernel"] = [fault] if fault else []
    ran = command(server, tmp_path, "push", [*FIRST, *words], version)
    assert ran.returncode == 1
    assert f"runs without sources that Kaggle did not find: {kind.lower()} {words[1]}" in ran.stderr
    assert "Cancel it under View Active Events on kaggle.com, or at https://www.kaggle.com/code/ann/" in ran.stderr
    assert len(server.kernels["ann/kdlib-distill"]) == 1


@BOTH
def test_a_notebook_that_is_not_found_has_a_hint(server, tmp_path, version):
    server.errors = ["Notebook not found"]
    ran = command(server, tmp_path, "push", ["--owner", "bob", "--title", "My run"], version)
    assert ran.returncode == 1
    assert "Notebook not found; bob/my-run is another user's or its name is taken" in ran.stderr
    assert "the credentials are those of 'ann'" in ran.stderr and ran.stderr.count("\n") == 1


NO_KEY = {"KAGGLE_USERNAME": None, "KAGGLE_KEY": None}
LOGIN = {"refresh_token": "again", "access_token": "current", "username": "ann", "scopes": []}
AHEAD, BEHIND = ({"access_token_expiration": f"{year}-01-01T00:00:00+00:00"} for year in (2999, 2001))
PAIR_OF_BOB = "Basic " + base64.b64encode(b"bob:key").decode()


def push_with(server, tmp_path, files, version="2.2.5", **variables):
    """A push with credentials in `files` (`{name: content}` in the home folder) and in variables."""
    home = tmp_path / "home"
    for name, content in files.items():
        (home / name).parent.mkdir(parents=True, exist_ok=True)
        (home / name).write_text(content)
    variables = {name: value and value.replace("HOME", str(home)) for name, value in {**NO_KEY, **variables}.items()}
    return command(server, tmp_path, "push", FIRST, version, **variables)


@BOTH
@pytest.mark.parametrize(
    ("files", "variables", "authorization"),
    [
        ({}, {"KAGGLE_API_TOKEN": "token"}, "Bearer token"),
        ({"there": "token"}, {"KAGGLE_API_TOKEN": "HOME/there"}, "Bearer token"),
        ({".kaggle/access_token": "token\n"}, {}, "Bearer token"),
        ({".kaggle/access_token.txt": "token"}, {}, "Bearer token"),
        ({".kaggle/credentials.json": json.dumps(LOGIN | AHEAD)}, {}, "Bearer current"),
        ({".kaggle/credentials.json": json.dumps(LOGIN | BEHIND)}, {}, "Bearer refreshed"),
        ({}, {"KAGGLE_USERNAME": "bob", "KAGGLE_KEY": "key"}, PAIR_OF_BOB),
        ({"kaggle.json": '{"username": "bob", "key": "key"}'}, {}, PAIR_OF_BOB),
        ({".kaggle/kaggle.json": '{"username": "bob", "key": "key"}'}, {"KAGGLE_CONFIG_DIR": None}, PAIR_OF_BOB),
    ],
)
def test_every_kind_of_credentials_works(server, tmp_path, version, files, variables, authorization):
    ran = push_with(server, tmp_path, files, version, **variables)
    assert (ran.returncode, ran.stderr) == (0, "")
    assert ran.stdout.startswith("Version 1 was pushed") and ran.stdout.count("\n") == 1
    assert server.authorizations == [authorization]


@BOTH
@pytest.mark.parametrize(
    ("files", "variables", "status", "says"),
    [
        ({}, {}, 2, "no Kaggle credentials; run `kaggle auth login`, or "),
        ({"kaggle.json": "KGAT_token"}, {}, 2, "kaggle.json holds only the older pair of user name and key"),
        ({}, {"KAGGLE_API_TOKEN": "wrong"}, 1, "the token of KAGGLE_API_TOKEN is unknown to Kaggle: wrong or incomplete; "),
        ({".kaggle/access_token": "wrong"}, {}, 1, "the token of ~/.kaggle/access_token is unknown to Kaggle"),
        ({".kaggle/access_token": "old"}, {}, 1, "the token of ~/.kaggle/access_token has expired or was revoked; "),
        ({"kaggle.json": '{"username": "b", "key": "k"}'}, {"KAGGLE_API_TOKEN": "old"}, 1, "the token of KAGGLE_API_TOKEN"),
        ({".kaggle/credentials.json": json.dumps(LOGIN | BEHIND)}, {}, 1, "the login of `kaggle auth login` has expired; "),
        ({"kaggle.json": '{"username": "b", "key": "k"}'}, {}, 1, "Kaggle does not accept the credentials: Unauth"),
        ({".kaggle/credentials.json": json.dumps(LOGIN | AHEAD)}, {}, 1, "Kaggle does not accept the credentials: Unauth"),
    ],
)  # fmt: skip
def test_absent_wrong_and_expired_credentials_are_told_apart(server, tmp_path, version, files, variables, status, says):
    server.tokens = {"wrong": None, "old": {"active": False}}
    server.faults = {"SaveKernel": ["401"], "GenerateAccessToken": ["401"]}
    ran = push_with(server, tmp_path, files, version, **variables)
    assert (ran.returncode, ran.stdout, ran.stderr.count("\n")) == (status, "", 1), ran.stderr
    assert ran.stderr.startswith("kaggle: ") and says in ran.stderr and "kaggle.com/settings" in ran.stderr
    assert server.kernels == {}


def test_a_token_that_cannot_be_checked_is_checked_again(server, tmp_path):
    server.faults["IntrospectToken"] = ["500", "drop", "401"]
    ran = push_with(server, tmp_path, {}, KAGGLE_API_TOKEN="token")
    assert (ran.returncode, ran.stderr.count("\n")) == (1, 1)
    assert "Kaggle does not accept the credentials: Unauthenticated" in ran.stderr
    server.faults["IntrospectToken"] = ["500", "drop", "500"]
    ran = push_with(server, tmp_path, {}, KAGGLE_API_TOKEN="token")
    assert (ran.returncode, ran.stdout.count("Kaggle did not respond")) == (0, 2), ran.stderr


def test_a_push_without_permission_is_one_line(server, tmp_path):
    server.faults["SaveKernel"] = ["403"]
    ran = command(server, tmp_path, "push", FIRST)
    assert ran.returncode == 1
    assert "the slug and the token)" in ran.stderr and "0123456789abcdef" not in ran.stderr + ran.stdout


def test_nothing_is_sent_for_a_mistake_or_a_dry_run(server, tmp_path):
    assert command(server, tmp_path, "push", [*FIRST, "--param", "max_stpes=3"]).returncode == 2
    assert command(server, tmp_path, "push", [*FIRST, "--dry-run"]).returncode == 0
    assert server.calls == []


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("NvidiaTeslaP100", "warning: NvidiaTeslaP100: retired on 2026-09-15"),
        ("Tpu1VmV38", "warning: Tpu1VmV38: retired"),
        ("TpuV6E8", "warning: TpuV6E8: a TPU, which kdlib does not use"),
        ("NvidiaTeslaT4x2", "warning: NvidiaTeslaT4x2: not in Kaggle's list; did you mean 'NvidiaTeslaT4'?"),
        ("Quantum9", "warning: Quantum9: not in Kaggle's list, "),
        *((name, "") for name in (
            "NvidiaTeslaT4", "none", "NvidiaTeslaT4Highmem", "NvidiaTeslaA100", "NvidiaL4", "NvidiaL4X1", "NvidiaH100",
            "NvidiaRtxPro6000",
        )),
    ],
)  # fmt: skip
def test_accelerators_that_kaggle_lists_pass_and_others_are_warned_of(capsys, name, says):
    assert push.run([*FIRST, "--accelerator", name, "--dry-run"]) == 0
    told = capsys.readouterr()
    assert told.err.startswith(says) and told.err.count("\n") == (1 if says else 0)
    sent = json.loads(told.out)
    assert sent.get("machine_shape", "none") == name
    assert (sent["enable_gpu"], sent["enable_tpu"]) == (name[:3] not in ("non", "Tpu"), name[:3] == "Tpu")


@BOTH
def test_the_plain_client_takes_the_committed_metadata(server, tmp_path, version):
    """`kaggle kernels push -p .` from the top, once the owner is set."""
    server.leave = None
    metadata = json.loads((HOUSE / "kernel-metadata.json").read_text())
    (tmp_path / "notebooks").mkdir()
    (tmp_path / "notebooks" / "distill.ipynb").write_text((HOUSE / "notebooks" / "distill.ipynb").read_text())
    (tmp_path / "kernel-metadata.json").write_text(
        json.dumps({**metadata, "id": metadata["id"].replace("OWNER", "ann")})
    )
    environment = {**server.environment(tmp_path / "home"), "PYTHONPATH": str(CLIENTS[version])}
    words = [sys.executable, "-m", "kaggle", "kernels", "push", "-p", "."]
    ran = subprocess.run(words, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert "Kernel version 1 successfully pushed" in ran.stdout, ran.stderr
    (request,) = pushes(server)
    assert (request["machineShape"], request["enableInternet"], request["slug"]) == (
        "NvidiaTeslaT4",
        True,
        "ann/kdlib-distill",
    )


# pull


@BOTH
def test_outputs_come_whole_over_all_pages(server, tmp_path, version):
    server.fates, server.page_size = ["complete"] * 3, 2
    for _ in range(3):
        command(server, tmp_path, "push", FIRST, version)
    wait_until(lambda: server.kernels["ann/kdlib-distill"][-1].status == "COMPLETE")
    server.faults["files"] = ["500", "429", "drop"]
    ran = command(server, tmp_path, "pull", ["ann/kdlib-distill", "--out", "got", "--version", "3"], version)
    assert ran.returncode == 0, ran.stderr
    there = server.kernels["ann/kdlib-distill"][2].outputs
    assert files_of(tmp_path / "got") == files_of(there) and len(files_of(there)) == 5


def test_outputs_that_do_not_come_leave_nothing(server, tmp_path):
    command(server, tmp_path, "push", FIRST)
    wait_until(lambda: server.kernels["ann/kdlib-distill"][-1].status == "COMPLETE")
    server.faults["files"] = ["drop"] * 99
    ran = command(server, tmp_path, "pull", ["ann/kdlib-distill", "--out", "got"])
    assert (ran.returncode, ran.stderr.count("\n")) == (1, 1), ran.stderr
    assert not [path for path in tmp_path.iterdir() if "got" in path.name]


def test_an_output_named_outside_the_folder_is_refused(server, tmp_path, monkeypatch):
    server.leave = lambda version, working: (working / "a").write_text("x")
    command(server, tmp_path, "push", FIRST)
    wait_until(lambda: server.kernels["ann/kdlib-distill"][-1].status == "COMPLETE")
    evil = {"files": [{"fileName": "../../evil", "url": "http://localhost/files/x"}]}
    monkeypatch.setattr(kaggle_server.Handler, "ListKernelSessionOutput", lambda self, request: evil)
    ran = command(server, tmp_path, "pull", ["ann/kdlib-distill", "--out", "got"])
    assert ran.returncode == 1 and "'../../evil'" in ran.stderr
