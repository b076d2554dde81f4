"""Each bad sign on records written by hand: raised when it should be, once, and not before."""

from kdlib.session.alerts import AlertMonitor


def train(step, loss=2.0, shares=None, parts=None, skipped="", last_step=200, weights=None, micro_batch=8):
    shares = shares or {"lm": 0.5, "kd": 0.5}
    parts = parts or dict.fromkeys(shares, loss)
    weights = weights or shares
    return {
        "kind": "train", "run": "distilled", "repeat": 0, "step": step, "loss": loss, "shares": shares, "parts": parts,
        "weights": weights, "skipped": skipped, "last_step": last_step, "micro_batch": micro_batch,
    }  # fmt: skip


def evaluation(step, bits, perplexity=30.0, progress=0.3):
    return {
        "kind": "eval", "run": "distilled", "repeat": 0, "step": step, "bits_per_byte": bits, "perplexity": perplexity,
        "progress": progress,
    }  # fmt: skip


def signs(records, micro_batch=8):
    monitor = AlertMonitor(micro_batch)
    return [(alert["step"], alert["sign"], alert["part"]) for record in records for alert in monitor.update(record)]


def falling(step):
    return 3.0 - 0.01 * step


def test_a_quiet_run_raises_nothing():
    assert signs([train(step, falling(step)) for step in range(1, 201)]) == []


def test_a_part_that_dominates_is_told_once_after_a_tenth():
    shares = {"lm": 0.1, "kd": 0.9}
    found = signs([train(step, falling(step), shares) for step in range(1, 201)])
    assert found == [(21, "dominance", "kd")]


def test_one_part_alone_does_not_dominate():
    assert signs([train(step, falling(step), {"lm": 1.0}) for step in range(1, 201)]) == []


def test_a_short_dominance_is_no_sign():
    records = [
        train(step, falling(step), {"lm": 0.9, "kd": 0.1} if 100 < step < 110 else None) for step in range(1, 201)
    ]
    assert signs(records) == []


def test_layerwise_above_two():
    parts = {"lm": 1.0, "kd": 1.0, "layerwise": 2.01}
    assert signs([train(1, parts=parts)]) == [(1, "layerwise", "layerwise")]
    assert signs([train(1, parts={**parts, "layerwise": 1.99})]) == []


def test_a_high_loss_counts_after_a_fifth():
    found = signs([train(step, 16.0 + falling(step)) for step in range(1, 61)])
    assert found == [(41, "high_loss", None)]


def test_a_loss_that_stays_is_a_plateau_and_one_that_falls_is_none():
    found = signs([train(step, 2.0 if step > 50 else falling(step)) for step in range(1, 201)])
    assert [sign for _, sign, _ in found] == ["plateau"]
    assert 60 < found[0][0] <= 100


def test_a_part_that_comes_in_is_no_plateau():
    records = []
    for step in range(1, 201):
        parts = {"lm": falling(step), "kd": falling(step)} | ({"layerwise": 1.0} if step > 60 else {})
        weights = dict.fromkeys(parts, 0.4)
        loss = sum(weights[name] * value for name, value in parts.items())
        shares = {name: weights[name] * value / loss for name, value in parts.items()}
        records.append(train(step, loss, shares, parts, weights=weights))
    assert signs(records) == []


def test_steps_without_a_number_are_told_first_and_every_tenth():
    found = signs([train(step, skipped="kd not finite (documents 3)") for step in range(1, 15)])
    assert [step for step, sign, _ in found if sign == "non_finite"] == [1, 5, 11]


def test_a_loss_scaler_may_look_for_its_factor():
    text = "gradient not finite at loss scale 32768, lowered (documents 3)"
    assert signs([train(step, skipped=text) for step in range(1, 5)]) == []
    assert signs([train(step, skipped=text) for step in range(1, 6)]) == [(5, "non_finite", None)]


def test_validation_that_no_longer_improves():
    bits = [3.0, 2.5, 2.4, 2.41, 2.42, 2.40, 2.45, 2.5, 2.6]
    assert signs([evaluation(step, value) for step, value in enumerate(bits)]) == [(7, "no_improvement", None)]


def test_a_student_that_passes_its_teacher_is_told_once_and_never_without_a_teacher():
    records = [evaluation(step, bits) for step, bits in enumerate((3.0, 2.5, 2.4, 2.3))]
    monitor = AlertMonitor(teacher_bits=2.5)
    found = [alert for record in records for alert in monitor.update(record)]
    assert [(alert["step"], alert["sign"]) for alert in found] == [(2, "teacher_passed")]
    assert "(2.4000 against 2.5000 bits per byte)" in found[0]["meaning"] and "adapt the teacher" in found[0]["advice"]
    assert signs(records) == []


def test_a_high_perplexity_counts_after_half():
    assert signs([evaluation(1, 3.0, 2000.0, 0.4), evaluation(2, 2.9, 2000.0, 0.6)]) == [(2, "high_perplexity", None)]


def test_alerts_say_what_it_means_and_what_to_try():
    (alert,) = AlertMonitor().update(train(7, skipped="kd not finite (documents 3)"))
    assert (alert["kind"], alert["run"], alert["repeat"], alert["step"]) == ("alert", "distilled", 0, 7)
    assert "kd not finite (documents 3)" in alert["meaning"]
    assert "learning_rate" in alert["advice"]


def test_a_smaller_micro_batch_is_told_each_time_it_shrinks():
    found = signs([train(1), train(2, micro_batch=4), train(3, micro_batch=4), train(4, micro_batch=1)])
    assert found == [(2, "memory", "4"), (4, "memory", "1")]
    assert signs([train(1, micro_batch=4)]) == [(1, "memory", "4")]
