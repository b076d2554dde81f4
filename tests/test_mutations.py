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
