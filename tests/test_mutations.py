import re
import subprocess
import sys

import mutations
import pytest


@pytest.mark.slow
def test_every_mutant_is_caught():
    assert mutations.main([]) == 0


def test_every_mutant_can_still_be_made():
    """The text that each mutant replaces stands in its file exactly once."""
    for name, (file, old, new, tests) in mutations.MUTANTS.items():
        assert mutations.place_of(file).read_text(encoding="utf-8").count(old) == 1, name
        assert old != new
        assert all((mutations.HOUSE / "tests" / test.split("::")[0]).exists() for test in tests), name


def test_no_mutant_names_what_does_not_exist(tmp_path):
    """A mutant that ends in a NameError is caught by any test, and proves nothing."""
    for number, (file, old, new, _) in enumerate(mutations.MUTANTS.values()):
        if not file.endswith(".py"):
            continue
        source = mutations.place_of(file).read_text(encoding="utf-8")
        (tmp_path / f"mutant_{number:03}.py").write_text(source.replace(old, new), encoding="utf-8")
    command = [
        sys.executable,
        "-m",
        "ruff",
        "check",
        "--isolated",
        "--select",
        "F821,F823",
        "--output-format",
        "concise",
    ]
    ran = subprocess.run([*command, str(tmp_path)], capture_output=True, text=True)
    names = list(mutations.MUTANTS)
    errors = re.findall(r"mutant_(\d+)\.py:\S+ (.*)", ran.stdout)
    assert [(names[int(number)], error) for number, error in errors] == []
    assert ran.returncode == 0, ran.stderr
