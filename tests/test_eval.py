"""The exported student under lm-eval, as docs/evaluation.md says: its own command, on a tiny task that is made here."""

import json
import os
import subprocess
from pathlib import Path

import pytest

from kdlib.config import Config
from kdlib.session.session import distill

EVAL = Path(os.environ.get("KDLIB_EVAL", Path(__file__).parent.parent / ".venv" / "eval"))
"""lm-eval in an environment of its own (`make test-slow`)."""
NONSENSE = "qxzqxzqxzqxzqxzqxzqx"
"""As long as what it is set against: lm-eval compares whole likelihoods."""
TASK = {
    "task": "which",
    "dataset_path": "json",
    "test_split": "test",
    "output_type": "multiple_choice",
    "doc_to_text": "{{question}}",
    "doc_to_choice": "{{choices}}",
    "doc_to_target": "answer",
    "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
}


@pytest.mark.slow
@pytest.mark.parametrize("adapters", [{}, {"lora_rank": 8}], ids=["in full", "LoRA"])
def test_lm_eval_reads_the_exported_student(settings, texts, tmp_path, adapters):
    """A choice between how a text goes on and letters that stand in none of them: what was learned is told from chance."""
    if not (EVAL / "ready").exists():
        pytest.skip(f"no lm-eval in {EVAL}; make test-slow puts it there")
    changes = {"control": "off", "max_steps": 60, "learning_rate": 1e-2, "batch_size": 8, **adapters}
    list(distill(Config.from_dict({**settings, **changes}), tmp_path / "run"))
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    cut = [(text[:40], text[40:60]) for text in texts]
    rows = [
        {"question": begin, "choices": [go_on, NONSENSE] if i % 2 else [NONSENSE, go_on], "answer": i % 2 ^ 1}
        for i, (begin, go_on) in enumerate(cut)
    ]
    (tasks / "which.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {**TASK, "dataset_kwargs": {"data_files": {"test": str(tasks / "which.jsonl")}}}
    (tasks / "which.yaml").write_text(json.dumps(task))  # JSON is YAML
    command = [
        str(EVAL / "bin" / "python"), "-m", "lm_eval", "--model", "hf",
        "--model_args", f"pretrained={tmp_path / 'run' / 'student'}",
        "--tasks", "which", "--include_path", str(tasks), "--output_path", str(tmp_path / "out"), "--device", "cpu",
    ]  # fmt: skip
    environment = {**os.environ, "HF_HOME": str(tmp_path / "hf"), "PYTHONWARNINGS": "ignore"}
    ran = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr[-2000:]
    (found,) = (tmp_path / "out").rglob("results_*.json")
    told = json.loads(found.read_text())
    assert told["n-samples"]["which"]["effective"] == len(texts)
    assert told["results"]["which"]["acc,none"] > 0.9
