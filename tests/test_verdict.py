import numpy as np
import pytest

from kdlib.evaluation import verdict
from kdlib.evaluation.scoring import Score


@pytest.mark.parametrize(
    ("freedom", "expected"), [(1, 12.706), (2, 4.303), (5, 2.571), (10, 2.228), (30, 2.042), (1000, 1.962)]
)
def test_t_quantile_is_the_tables(freedom, expected):
    assert verdict.t_quantile(freedom) == pytest.approx(expected, abs=2e-3)


def test_gain_is_bits_saved_over_bytes():
    control, distilled = np.array([[100.0, 60.0]]), np.array([[90.0, 58.0]])
    gain, low, high = verdict.gain_interval(control, distilled, np.array([40, 20]))
    assert gain == pytest.approx(12 / 60)
    # by hand: residuals 10 - 8 = 2 and 2 - 4 = -2; variance 2 * (4 + 4) / 60^2; t(1) = 12.706
    half = 12.706 * (2 * 8 / 3600) ** 0.5
    assert (low, high) == pytest.approx((gain - half, gain + half), rel=1e-3)


def test_interval_over_runs_adds_their_spread():
    control = np.array([[100.0, 100.0], [100.0, 100.0], [100.0, 100.0]])
    distilled = control - np.array([[1.0], [2.0], [3.0]]) * 10
    gain, low, high = verdict.gain_interval(control, distilled, np.array([100, 100]))
    assert gain == pytest.approx(0.2)
    # documents do not differ, so only runs count: standard error 0.1 / sqrt(3), t(2) = 4.303
    assert high - gain == pytest.approx(4.303 * 0.1 / 3**0.5, rel=1e-3)
    assert gain - low == pytest.approx(high - gain)


def test_intervals_hold_the_truth_as_often_as_they_say():
    """400 simulated studies of 3 runs and 30 documents of different sizes; 95 % intervals hold the true gain in
    90 to 99 % of them."""
    chance = np.random.default_rng(0)
    held = 0
    for _ in range(400):
        num_bytes = chance.integers(500, 4000, 30)
        by_document = 0.1 + 0.15 * chance.standard_normal(30)
        by_run = 0.03 * chance.standard_normal((3, 1))
        control = 2.3 * num_bytes + np.zeros((3, 1))
        _, low, high = verdict.gain_interval(control, control - (by_document + by_run) * num_bytes, num_bytes)
        held += low <= 0.1 <= high
    assert 0.90 <= held / 400 <= 0.99


def test_identical_runs_have_no_gain_and_no_spread():
    bits = np.array([[10.0, 20.0]])
    assert verdict.gain_interval(bits, bits, np.array([5, 10])) == (0.0, 0.0, 0.0)


def test_one_run_on_one_document_can_not_tell():
    gain, low, high = verdict.gain_interval(np.array([[10.0]]), np.array([[5.0]]), np.array([5]))
    assert gain == 1.0
    assert (low, high) == (-np.inf, np.inf)
    assert verdict.judge("full", gain, low, high) == "unclear"


@pytest.mark.parametrize(
    ("control", "low", "high", "answer"),
    [("full", 0.1, 0.2, "helped"), ("short", -0.2, -0.1, "did not help"), ("full", -0.1, 0.2, "unclear"),
     ("off", 0.1, 0.2, "unclear")],
)  # fmt: skip
def test_the_answer_follows_the_interval(control, low, high, answer):
    assert verdict.judge(control, 0.0, low, high) == answer


def score(bits):
    bits = np.array(bits)
    num_bytes = np.array([100, 200, 300])
    return Score(bits.sum() / 600, 9.0, 0.5, 0.4, bits, num_bytes)


def test_the_verdict_names_all_models_and_its_gain_is_their_difference():
    pairs = [
        (score([250.0, 480.0, 700.0]), score([240.0, 470.0, 690.0])),
        (score([251, 482, 705]), score([243, 471, 690])),
    ]
    scores = {
        "teacher": score([200, 400, 600]), "student_before": score([400, 800, 1200]),
        "ce_only": verdict.mean_score([ce for ce, _ in pairs]), "distilled": verdict.mean_score([kd for _, kd in pairs]),
    }  # fmt: skip
    found = verdict.make_verdict("full", scores, pairs)
    bits = found["bits_per_byte"]
    assert set(bits) == {"teacher", "student_before", "ce_only", "distilled"}
    assert found["gain"] == pytest.approx(bits["ce_only"] - bits["distilled"]) == pytest.approx(32 / 600)
    assert found["interval"][0] < found["gain"] < found["interval"][1]
    assert found["helped"] is True
    assert found["gain_by_run"] == pytest.approx([30 / 600, 34 / 600])
    assert "Distillation helped: +0.0533 bits per byte saved" in found["sentence"]


def test_without_a_control_the_verdict_says_so():
    scores = {name: score([1.0, 2.0, 3.0]) for name in ("teacher", "student_before", "distilled")} | {"ce_only": None}
    found = verdict.make_verdict("off", scores, [])
    assert found["gain"] is found["interval"] is found["helped"] is found["bits_per_byte"]["ce_only"] is None
    assert "control: off" in found["sentence"]
