"""Causal language models of every kind, as student and as teacher: three steps, their own loss, and a whole export."""

import pytest
from causal_models import CLASSES, PAGE, Bench, page

FAMILIES = (
    "llama", "qwen3", "qwen3_5", "gemma2", "gemma3", "gemma4", "granitemoehybrid", "cohere2", "ministral3", "lfm2",
    "qwen3_moe", "deepseek_v3", "mamba", "opt",
)  # fmt: skip
pytestmark = pytest.mark.filterwarnings("ignore")  # of transformers, about kernels that are not installed


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    return Bench(tmp_path_factory.mktemp("bench"))


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_is_trained_and_teaches(bench, name):
    assert bench.outcomes(name) == {"student": "works", "teacher": "works"}


@pytest.mark.parametrize(
    ("name", "reason"),
    [("bert", "logits are not a scaled or capped product"), ("cpmant", "it attends to later tokens")],
)
def test_what_is_no_causal_language_model_is_refused_in_both_roles(bench, name, reason):
    outcomes = bench.outcomes(name)
    assert all(text.startswith("refused: ") and reason in text for text in outcomes.values()), outcomes


@pytest.mark.slow
def test_every_class_works_or_is_refused_as_the_page_says(bench):
    """None ends in a traceback, and none differs from the model's own loss."""
    assert page({name: bench.outcomes(name) for name in CLASSES}) == PAGE.read_text(encoding="utf-8")
