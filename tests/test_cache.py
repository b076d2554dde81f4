"""A teacher that has spoken before says the same: what is on the disk, who may read it, and what a kill leaves."""

import copy
import dataclasses
import itertools
import json
import math
import os
import random
import shutil
import signal
import time

import pytest
import safetensors.torch
import torch
from clocks import Ticks
from families import byte_level, tiny_model
from host_reads import HostReads
from processes import CONTEXT

from kdlib import cli, demo, files
from kdlib.config import Config
from kdlib.data import batching
from kdlib.losses import divergences, partial_tokens
from kdlib.losses.teacher_signal import TopKLogProbs
from kdlib.models import forward, loading, teacher_cache, trie
from kdlib.session import cache_writer, inputs, session

HALF = 2.0**-11
"""Relative error of a number rounded to float16."""
SMALL = 500


@pytest.fixture(autouse=True)
def _small_shards(monkeypatch):
    monkeypatch.setattr(teacher_cache, "SHARD_POSITIONS", SMALL)


def written(settings, out, **how):
    return list(cache_writer.cache_teacher(Config.from_dict(settings), out, **how))


@pytest.fixture(scope="module")
def caches(pair, tmp_path_factory):
    """`(settings, folder)` by name: caches of the pair's text, with everything in them."""
    folder = tmp_path_factory.mktemp("caches")
    base = {
        "teacher": str(pair / "teacher"), "student": str(pair / "student"), "dataset": str(pair / "text.jsonl"),
        "max_length": 48, "batch_size": 2, "max_steps": 4, "learning_rate": 1e-3, "check_teacher": False,
        "eval_tokens": 300, "control": "off", "contrastive_weight": 0.1,
    }  # fmt: skip
    kinds = {
        "prefix": {"kd_method": "first_token"},
        "vocab": {"kd_method": "shared_vocab", "kd_temperature": 2.0},
        "all": {"kd_method": "first_token", "kd_top_k": 10**6},
        "soft": {"kd_method": "first_token", "kd_top_k": 10**6, "kd_temperature": 2.0},
        "inside": {},
        "inside all": {"kd_top_k": 10**6},
        "inside soft": {"kd_top_k": 10**6, "kd_temperature": 2.0},
    }
    before = teacher_cache.SHARD_POSITIONS, teacher_cache.INSIDE_K
    made, teacher_cache.SHARD_POSITIONS = {}, SMALL
    for name, changes in kinds.items():
        made[name] = {**base, **changes}, folder / name
        teacher_cache.INSIDE_K = (4, 3) if name == "inside" else (10**6, 10**6)
        written(*made[name])
    teacher_cache.SHARD_POSITIONS, teacher_cache.INSIDE_K = before
    return made


@pytest.fixture(scope="module")
def loaded(caches):
    """Inputs by the name of their cache: `(config, live, cached)`."""
    found = {}
    for name, (settings, folder) in caches.items():
        config = Config.from_dict(settings)
        cached = inputs.load(config.replace(teacher="", teacher_cache=str(folder)))
        found[name] = config, inputs.load(config), cached
    return found


def shortlist_of(live, config):
    settings = teacher_cache.settings_of(config, len(live.pair.shared))
    return teacher_cache.topk_spec(live.pair, trie.buckets_of(live.pair, settings["kd_method"]), settings)


def batch_of(loaded, count=6):
    return batching.collate(loaded.train[3 : 3 + count], *loaded.pair.pads)


def objective_of(loaded, config):
    torch.manual_seed(0)
    return inputs.make_objective(loaded.pair, config, copy.deepcopy(loaded.pair.student)).eval()


def counts_of(batch):
    return {name: getattr(batch, f"num_{name}") for name in ("labels", "aligned", "spans")}


def said_inside(live, config, batch, *sizes):
    """What a live teacher says inside tokens, in short; and its signal."""
    walked, teacher = partial_tokens.PartialTokens.build(trie.tries_of(live.pair), batch), live.pair.teacher
    signal = teacher(batch, shortlist=shortlist_of(live, config), inner=True)
    tries, bucket_of = (
        trie.tries_of(live.pair),
        teacher.student_side_head.by_column(trie.buckets_of(live.pair, "").teacher),
    )
    return walked.top_k_outcomes(
        tries, signal, teacher.student_side_head.decode, bucket_of, sizes, config.kd_temperature
    ), signal


def parts_and_gradient(loaded, config, batch, signal):
    objective = objective_of(loaded, config)
    loss, parts, _ = objective(batch, signal, counts_of(batch))
    loss.backward()
    gradient = torch.cat([p.grad.flatten() for p in objective.student.parameters() if p.grad is not None])
    return {name: float(value) for name, value in parts.items()}, gradient


@pytest.mark.parametrize("name", ["prefix", "vocab"])
def test_the_likeliest_tokens_are_written_out(loaded, name):
    config, live, _ = loaded[name]
    wanted, batch = shortlist_of(live, config), batch_of(live)
    top = live.pair.teacher(batch, shortlist=wanted).topk
    buckets = trie.buckets_of(live.pair, config.kd_method)
    hidden = forward.last_hidden(live.pair.teacher.model, batch.teacher_ids, batch.teacher_mask).flatten(0, 1)
    bytes_of = live.pair.student_reader.vocabulary.tokens, live.pair.teacher.reader.vocabulary.tokens
    for row, place in list(enumerate(batch.teacher_rows.tolist()))[::7]:
        logits = (hidden[place].double() @ live.pair.teacher.head.weight.double().T).tolist()
        whole = math.fsum(math.exp(x) for x in logits)
        mass = [0.0] * buckets.num
        for column, x in enumerate(logits):
            mass[buckets.teacher[column]] += math.exp(x) / whole
        softened = [m ** (1 / config.kd_temperature) for m in mass]
        mass = [m / math.fsum(softened) for m in softened]
        by_id = {int(buckets.student_ids[b]): m for b, m in enumerate(mass[:-1])}
        expected = sorted(by_id.values(), reverse=True)[: wanted.k]
        assert [by_id[i] for i in top.ids[row].tolist()] == pytest.approx(expected, rel=1e-5)
        assert top.log_probs[row, :-1].exp().tolist() == pytest.approx(expected, rel=1e-4)
        assert float(top.log_probs[row, -1].exp()) == pytest.approx(1.0 - math.fsum(expected), rel=1e-3, abs=1e-6)
        said = bytes_of[1][max(range(len(logits)), key=logits.__getitem__)]
        best = int(top.best[row])
        assert (bytes_of[0][best] == said) if best >= 0 else (said not in bytes_of[0] or said is None)


def test_fewer_tokens_leave_the_rest_to_the_tail():
    top = TopKLogProbs(torch.tensor([[4, 2, 7]]), torch.tensor([[0.4, 0.3, 0.2, 0.1]]).log())
    fewer = top.truncate(1)
    assert fewer.ids.tolist() == [[4]]
    torch.testing.assert_close(fewer.log_probs.exp(), torch.tensor([[0.4, 0.6]]))
    assert top.truncate(3) is top


@pytest.mark.parametrize("name", ["prefix", "vocab", "all", "soft"])
def test_what_is_read_is_what_the_teacher_says_to_the_stated_rounding(loaded, name):
    config, live, cached = loaded[name]
    wanted = shortlist_of(live, config)
    for first in range(0, len(live.train), 5):
        batch = batching.collate(live.train[first : first + 5], *live.pair.pads)
        told, read = live.pair.teacher(batch, spans=True, shortlist=wanted), cached.pair.teacher(batch, spans=True)
        torch.testing.assert_close(
            read.span_log_probs, told.span_log_probs, rtol=1e-5, atol=1e-4
        )  # float32, in batches of other widths
        torch.testing.assert_close(read.hidden, told.hidden, rtol=2 * HALF, atol=1e-4)
        torch.testing.assert_close(read.topk.log_probs, told.topk.log_probs, rtol=2 * HALF, atol=2e-3)
        torch.testing.assert_close(read.topk.log_probs.exp().sum(dim=-1), torch.ones(batch.num_aligned))
        same = (read.topk.ids == told.topk.ids).float().mean()
        assert same > 0.99  # equals may change places


@pytest.mark.parametrize("name", ["inside", "inside all", "inside soft"])
def test_what_is_read_inside_tokens_is_what_the_teacher_says(loaded, name):
    config, live, cached = loaded[name]
    seen = [0, 0]
    for first in range(0, len(live.train), 5):
        batch = batching.collate(live.train[first : first + 5], *live.pair.pads)
        read = cached.pair.teacher(batch, inner=True).partial_topk
        for kind, (ours, theirs) in enumerate(
            zip(said_inside(live, config, batch, *(each.ids.shape[1] for each in read))[0], read, strict=True)
        ):
            there = ours.log_probs > -60.0
            torch.testing.assert_close(theirs.log_probs[there], ours.log_probs[there], rtol=2 * HALF, atol=2e-3)
            assert (theirs.log_probs[~there] < -60.0).all()
            torch.testing.assert_close(theirs.log_probs.exp().sum(dim=-1), torch.ones(len(ours.ids)))
            assert (theirs.ids == ours.ids)[there[:, :-1]].float().mean() > 0.99
            seen[kind] += len(ours.ids)
    assert min(seen) > 100
    assert cached.pair.teacher(batch).partial_topk is None
    assert [each.ids.shape[1] for each in read] == ([4, 3] if name == "inside" else [len(live.pair.shared)] * 2)


def test_windows_are_found_in_any_order_and_from_any_shard(loaded):
    _, live, cached = loaded["prefix"]
    assert len(cached.pair.teacher.shards.files) > 3
    order = random.Random(0).sample(live.train, 12)
    batch = batching.collate(order, *live.pair.pads)
    read = cached.pair.teacher(batch)
    alone = [cached.pair.teacher(batching.collate([window], *live.pair.pads)) for window in order]
    assert torch.equal(read.topk.ids, torch.cat([each.topk.ids for each in alone]))
    assert torch.equal(read.hidden, torch.cat([each.hidden for each in alone]))


WAYS = [
    ("all", {}), ("soft", {}), ("prefix", {"kd_method": "chunk_likelihood"}), ("prefix", {"kd_method": "projector"}),
    ("all", {"kd_divergence": "jsd"}), ("all", {"kd_method": "none"}), ("inside all", {}),
    ("inside soft", {"kd_divergence": "jsd"}), ("inside all", {"kd_method": "first_token"}),
]  # fmt: skip


@pytest.mark.parametrize(("name", "changes"), WAYS)
def test_the_loss_from_the_cache_is_the_live_one_to_the_stated_rounding(loaded, name, changes):
    """Where the cache holds every token; the live teacher is asked as always."""
    config, live, cached = loaded[name]
    config, batch = config.replace(**changes, kd_top_k=0), batch_of(live)
    wanted = {"spans": config.kd_method == "chunk_likelihood", "inner": config.kd_method == "byte_prefix"}
    here, there = (
        parts_and_gradient(each, config, batch, each.pair.teacher(batch, **wanted)) for each in (live, cached)
    )
    for part, value in here[0].items():
        assert there[0][part] == pytest.approx(value, rel=4 * HALF, abs=1e-5), part
    assert float((there[1] - here[1]).norm()) < 8 * HALF * float(here[1].norm())


@pytest.mark.parametrize("k", [3, 64])
def test_a_cut_loss_is_the_live_one_over_the_same_tokens(loaded, k):
    config, live, cached = loaded["prefix"]
    config, batch = config.replace(kd_top_k=k), batch_of(live)
    told = live.pair.teacher(batch, shortlist=shortlist_of(live, config))
    here = parts_and_gradient(live, config, batch, told)
    there = parts_and_gradient(cached, config, batch, cached.pair.teacher(batch))
    for part, value in here[0].items():
        assert there[0][part] == pytest.approx(value, rel=4 * HALF, abs=1e-5), part
    assert float((there[1] - here[1]).norm()) < 8 * HALF * float(here[1].norm())
    whole = parts_and_gradient(live, config.replace(kd_top_k=0), batch, live.pair.teacher(batch))
    assert there[0]["kd"] < whole[0]["kd"]  # fewer outcomes: a lower bound
    assert there[0]["kd_covered"] == pytest.approx(float(1.0 - told.topk.log_probs[:, -1].exp().mean()), rel=1e-2)


def test_a_cut_loss_inside_tokens_is_the_live_one_over_the_same_outcomes(loaded):
    config, live, cached = loaded["inside"]
    batch = batch_of(live)
    whole = parts_and_gradient(live, config, batch, live.pair.teacher(batch, inner=True))
    found = []
    for k in (0, 2):
        config = config.replace(kd_top_k=k)
        said, signal = said_inside(live, config, batch, k or 4, k or 3)
        here = parts_and_gradient(live, config, batch, dataclasses.replace(signal, partial_topk=said))
        there = parts_and_gradient(cached, config, batch, cached.pair.teacher(batch, inner=True))
        assert there[0]["kd"] == pytest.approx(here[0]["kd"], rel=4 * HALF)
        assert there[0]["kd_positions"] == pytest.approx(whole[0]["kd_positions"], rel=1e-6)
        assert float((there[1] - here[1]).norm()) < 8 * HALF * float(here[1].norm())
        found.append(there[0]["kd"])
    assert found[1] < found[0] < whole[0]["kd"]  # fewer outcomes: a lower bound


@pytest.mark.parametrize("name", ["prefix", "inside"])
def test_between_forward_and_backward_the_host_waits_for_nothing(loaded, monkeypatch, name):
    config, _, cached = loaded[name]
    objective, batch = objective_of(cached, config), batch_of(cached).to("cpu")
    signal, counts = cached.pair.teacher(batch, **objective.teacher_request(objective.weights())), counts_of(batch)
    with HostReads(monkeypatch) as recorder:
        objective(batch, signal, counts)[0].backward()
    assert recorder.reads == []


@pytest.mark.parametrize("packed", [False, True])
def test_the_loss_from_the_cache_does_not_know_chunks(loaded, packed):
    config, _, cached = loaded["inside"]
    batch = batching.collate(cached.train[:7], *cached.pair.pads, (130, 160) if packed else (0, 0))
    assert batch.student_packed == packed
    signal = cached.pair.teacher(batch, inner=True)
    whole, cut = (parts_and_gradient(cached, config.replace(loss_chunk_size=n), batch, signal) for n in (10**6, 5))
    assert cut[0] == pytest.approx(whole[0], rel=1e-5)
    assert float((cut[1] - whole[1]).norm()) < 1e-4 * float(whole[1].norm())


def test_a_cut_divergence_is_zero_at_equality_and_written_out():
    student = torch.tensor([[0.1, 0.2, 0.3, 0.4]]).log()
    ids, teacher = torch.tensor([[3, 0]]), torch.tensor([[0.5, 0.2, 0.3]]).log()
    ours = divergences.gather_with_tail(student, ids)
    torch.testing.assert_close(ours.exp(), torch.tensor([[0.4, 0.1, 0.5]]))
    by_hand = 0.5 * math.log(0.5 / 0.4) + 0.2 * math.log(0.2 / 0.1) + 0.3 * math.log(0.3 / 0.5)
    assert float(divergences.forward_kl(ours, teacher)) == pytest.approx(by_hand, rel=1e-5)
    assert float(divergences.forward_kl(ours, ours)) == 0.0


def test_scores_from_the_cache_are_the_live_ones(loaded):
    from kdlib.evaluation import scoring

    _, live, cached = loaded["all"]
    for split in ("validation", "test"):
        here, there = (getattr(each, split) for each in (live, cached))
        ours, theirs = (
            scoring.evaluate_student(each.pair.student, each.pair.head, text)
            for each, text in ((live, here), (cached, there))
        )
        assert theirs.bits_per_byte == ours.bits_per_byte
        assert theirs.kl_to_teacher == pytest.approx(ours.kl_to_teacher, rel=4 * HALF)
        assert theirs.top1_agreement == pytest.approx(ours.top1_agreement, abs=0.01)
        known = there.teacher_score
        assert known.bits_per_byte == pytest.approx(here.teacher_score.bits_per_byte, rel=1e-6)
        halved = there.halved()
        assert scoring.evaluate_student(cached.pair.student, cached.pair.head, halved).kl_to_teacher == pytest.approx(
            theirs.kl_to_teacher, rel=1e-5
        )


def test_no_weight_of_the_teacher_is_ever_loaded(caches, tmp_path, monkeypatch):
    settings, folder = caches["prefix"]
    wanted = []
    load = loading.load_model
    monkeypatch.setattr(
        loading, "load_model", lambda source, *more, **named: wanted.append(source) or load(source, *more, **named)
    )
    found = list(
        session.distill(Config.from_dict({**settings, "teacher": "", "teacher_cache": str(folder)}), tmp_path / "out")
    )
    assert found[-1]["kind"] == "verdict"
    assert set(wanted) == {settings["student"]}
    assert found[-1]["samples"]["teacher"]
    assert set(found[-1]["recut"]) == {"student_before", "distilled"}
    assert all(0.0 <= share <= 1.0 for share in found[-1]["recut"].values())
    assert not list(folder.rglob("*.bin")) and not (folder / "teacher" / "model.safetensors").exists()


def test_a_run_from_the_cache_that_is_cut_goes_on_to_the_same_bytes(caches, tmp_path, monkeypatch):
    settings, folder = caches["prefix"]
    config = Config.from_dict({**settings, "teacher_cache": str(folder)})
    list(session.distill(config, tmp_path / "whole"))
    moved = tmp_path / "moved"
    shutil.copytree(folder, moved)
    run = session.distill(config, tmp_path / "cut")
    next(record for record in run if record["kind"] == "train" and record["step"] == 2)
    run.close()
    with pytest.raises(ValueError, match="the source of the teacher's signal"):
        list(session.distill(config.replace(teacher_cache="live"), tmp_path / "cut"))
    list(session.distill(config.replace(teacher_cache=str(moved)), tmp_path / "cut"))
    ends = [(tmp_path / name / "student" / "model.safetensors").read_bytes() for name in ("whole", "cut")]
    assert ends[0] == ends[1]


def test_a_position_takes_at_most_300_bytes_and_what_was_said_before(caches, monkeypatch):
    settings = {"kd_top_k": 64, "inside_k": [], "hidden": False}
    assert teacher_cache.bytes_per_position(settings, 49_152, 1024) == 64 * 2 + 65 * 2 + 4 <= 300
    assert teacher_cache.bytes_per_position({**settings, "hidden": True}, 49_152, 1024) == 262 + 2048
    inside = teacher_cache.bytes_per_position({**settings, "inside_k": [16, 8]}, 49_152, 1024, (0.5, 0.25))
    assert inside == 262 + 0.5 * (16 * 2 + 17 * 2) + 0.25 * (8 * 2 + 9 * 2)
    for name, rel in (("vocab", 0.05), ("inside all", 0.15)):  # this one's sample is small
        values, folder = caches[name]
        monkeypatch.setattr(teacher_cache, "INSIDE_K", (10**6, 10**6))
        plan = next(cache_writer.cache_teacher(Config.from_dict(values), folder))
        on_disk = sum(path.stat().st_size for path in folder.glob("train-*.safetensors"))
        train = teacher_cache.CachedTeacher([folder]).shards.counts[""].sum()
        assert on_disk == pytest.approx(train * plan["bytes_a_position"], rel=rel)
        assert plan["missing"] == 0


def test_a_long_text_has_larger_shards_not_more_of_them(caches, monkeypatch):
    values, _ = caches["vocab"]
    windows = inputs.load(Config.from_dict(values)).train
    plain = teacher_cache.plan_shards(windows)
    monkeypatch.setattr(teacher_cache, "MAX_SHARDS", 2)
    few = teacher_cache.plan_shards(windows)
    assert len(plain) > 2 >= len(few) > 1
    assert [first for first, _ in few] == [0, *(last for _, last in few[:-1])]
    assert few[-1][1] == plain[-1][1] == len(windows)


def files_of(folder):
    return {path.name: path.read_bytes() for path in folder.glob("*") if path.is_file()}


def drive(settings, out, small):
    torch.set_num_threads(1)
    teacher_cache.SHARD_POSITIONS = small
    written(settings, out)


def test_a_pass_that_is_killed_again_and_again_ends_with_the_same_bytes(caches, tmp_path):
    settings, folder = caches["prefix"]
    chance, out, kills, seen = random.Random(1), tmp_path / "out", 0, set()
    for _ in range(40):
        process = CONTEXT.Process(target=drive, args=(settings, out, SMALL))
        process.start()
        target = len(list(out.glob("*.safetensors"))) + chance.randrange(2, 5)
        while process.is_alive() and len(list(out.glob("*.safetensors"))) < target:
            time.sleep(chance.random() * 0.002)
        kills += process.is_alive()
        process.kill()
        process.join()
        seen |= {path.name for path in out.glob("*.safetensors")}
        whole = files_of(folder)
        assert all(content == whole[name] for name, content in files_of(out).items() if not name.endswith(".tmp"))
        if len(seen) == len(list(folder.glob("*.safetensors"))):
            break
    assert kills >= 3
    written(settings, out)
    left = {name: content for name, content in files_of(out).items() if not name.endswith(".tmp")}
    assert left == files_of(folder)


def test_a_shard_whose_writing_breaks_off_is_not_there(caches, tmp_path, monkeypatch):
    settings, folder = caches["prefix"]
    out, whole, save, calls = tmp_path / "out", files_of(folder), safetensors.torch.save_file, itertools.count(1)

    def breaks_off(tensors, path, **more):
        save(tensors, path, **more)
        if next(calls) == 4:
            os.truncate(path, os.path.getsize(path) // 2)
            raise KeyboardInterrupt

    monkeypatch.setattr(safetensors.torch, "save_file", breaks_off)
    with pytest.raises(KeyboardInterrupt):
        written(settings, out)
    left = {name: content for name, content in files_of(out).items() if name.endswith(".safetensors")}
    assert len(left) == 3 and all(content == whole[name] for name, content in left.items())
    assert written(settings, out)[-1]["missing"] == 0
    assert {name: content for name, content in files_of(out).items() if not name.endswith(".tmp")} == whole


def test_a_pass_that_is_asked_to_stop_says_so_and_goes_on(caches, tmp_path):
    settings, folder = caches["prefix"]
    out = tmp_path / "out"
    for record in cache_writer.cache_teacher(Config.from_dict(settings), out):
        if record["kind"] == "shard":
            signal.raise_signal(signal.SIGTERM)
    assert record["kind"] == "paused" and "SIGTERM" in record["reason"]
    assert 0 < record["missing"] < len(list(folder.glob("*.safetensors")))
    assert written(settings, out)[-1] == {"kind": "complete", "missing": 0}
    assert files_of(out) == files_of(folder)


def test_a_session_ends_before_its_time_is_up(caches, tmp_path):
    class Slow:
        seconds = 0.0

        def now(self):
            self.seconds += 10.0
            return self.seconds

    settings, _ = caches["prefix"]
    clock = Slow()
    found = written({**settings, "time_budget": "200s"}, tmp_path / "out", clock=clock)
    assert found[-1]["kind"] == "paused" and "time budget" in found[-1]["reason"]
    assert 100.0 <= clock.seconds - 10.0 <= 200.0 and found[-1]["missing"] > 0
    left = [record["left_s"] for record in found if record["kind"] == "shard"]
    assert left[0] > left[-1] or len(left) == 1


def test_several_writers_make_what_one_makes(caches, tmp_path, monkeypatch):
    settings, folder = caches["inside"]
    monkeypatch.setattr(teacher_cache, "INSIDE_K", (4, 3))
    parts = [tmp_path / name for name in ("a", "b", "c")]
    ends = [written(settings, part, writer=(i, 3))[-1] for i, part in enumerate(parts)]
    assert all(end["missing"] > 0 for end in ends)
    names = [{path.name for path in part.glob("*.safetensors") if path.name != "head.safetensors"} for part in parts]
    assert not any(a & b for a, b in itertools.combinations(names, 2))
    with pytest.raises(ValueError, match=r"not complete: \d+ of \d+ shards are missing"):
        teacher_cache.CachedTeacher(parts[:2])
    teacher = teacher_cache.CachedTeacher(parts)
    one = teacher_cache.CachedTeacher([folder]).shards.counts
    assert {kind: each.tolist() for kind, each in teacher.shards.counts.items()} == {
        kind: each.tolist() for kind, each in one.items()
    }
    assert written(settings, tmp_path / "whole", others=parts)[-1]["missing"] == 0
    assert files_of(tmp_path / "whole") == files_of(folder)
    together = tmp_path / "together"
    for i in range(3):
        written(settings, together, writer=(i, 3))
    assert files_of(together) == files_of(folder)


@pytest.mark.parametrize(
    ("name", "changes", "match"),
    [
        ("prefix", {"layerwise_weight": 0.1}, "layerwise needs the teacher's layers"),
        ("prefix", {"kd_top_k": 65}, "holds 64 tokens per position, kd_top_k is 65; lower it"),
        ("prefix", {"kd_method": "shared_vocab"}, "written for kd_method first_token, this run has shared_vocab"),
        ("prefix", {"kd_method": "byte_prefix"}, "written for kd_method first_token, this run has byte_prefix"),
        ("prefix", {"kd_temperature": 2.0}, "written for kd_temperature 1.0, this run has 2.0"),
        ("prefix", {"max_length": 40}, "written for max_length 48, this run has 40"),
        ("prefix", {"eval_tokens": 200}, "written for eval_tokens 300"),
        ("prefix", {"dataset": "other.jsonl"}, "of another run: the text"),
        ("prefix", {"student": "other"}, "of another run: the student's tokenizer"),
        ("prefix", {"teacher": "other"}, "written by a teacher with another tokenizer"),
        ("bare", {"contrastive_weight": 0.1}, "contrastive_weight needs the teacher's hidden states"),
        ("bare", {"kd_method": "projector"}, "kd_method projector needs the teacher's hidden states"),
        ("nowhere", {}, "nowhere holds no teacher cache"),
    ],
)
def test_what_a_cache_can_not_serve_is_refused_in_one_line(caches, tmp_path, monkeypatch, name, changes, match):
    settings, folder = caches["prefix"]
    monkeypatch.chdir(tmp_path)
    settings = {**settings, "contrastive_weight": 0.0}
    if name == "bare":
        folder = tmp_path / "bare"
        written(settings, folder)
    folder = tmp_path / "nowhere" if name == "nowhere" else folder
    lines = "".join(json.dumps({"text": f"Another text, {i} of many."}) + "\n" for i in range(60))
    (tmp_path / "other.jsonl").write_text(lines)
    tokenizer = byte_level(300)
    demo.save(tiny_model(tokenizer, 16), tokenizer, tmp_path / "other")
    config = Config.from_dict({**settings, "teacher_cache": str(folder), **changes})
    with pytest.raises(ValueError, match=match) as refused:
        inputs.load(config)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("name", "changes"), [
        ("prefix", {"kd_top_k": 8}), ("prefix", {"kd_method": "chunk_likelihood", "kd_temperature": 5.0}),
        ("prefix", {"kd_method": "projector"}),
        ("prefix", {"batch_size": 5, "learning_rate": 0.1, "seed": 3, "kd_divergence": "reverse_kl"}),
        ("inside", {"grad_accumulation": 2}), ("inside", {"kd_method": "first_token"}),
    ]
)  # fmt: skip
def test_what_a_cache_can_serve_is_served(caches, tmp_path, name, changes):
    settings, folder = caches[name]
    tokenizer = loading.load_tokenizer(settings["student"], "student")
    demo.save(tiny_model(tokenizer, 24), tokenizer, tmp_path / "wider")  # another student with the same tokenizer
    changes = {"teacher": "", "student": str(tmp_path / "wider"), "teacher_cache": str(folder), **changes}
    found = list(session.distill(Config.from_dict({**settings, **changes}), tmp_path / "out"))
    assert found[-1]["kind"] == "verdict"
    inside = {"kd_positions"} & {name for record in found for name in record.get("figures", ())}
    assert bool(inside) == ({**settings, **changes}.get("kd_method") is None)


def damaged(folder, what):
    shard = folder / "train-00001.safetensors"
    if what == "cut off":
        shard.write_bytes(shard.read_bytes()[:-100])
    elif what == "empty":
        shard.write_bytes(b"")
    elif what == "not one of ours":
        safetensors.torch.save_file({"ids": torch.zeros(3)}, shard)
    elif what == "its numbers changed":
        content = bytearray(shard.read_bytes())
        content[-100] ^= 1
        shard.write_bytes(bytes(content))
    elif what == "fewer windows":
        tensors, told = (
            safetensors.torch.load_file(shard),
            teacher_cache._open(shard, teacher_cache.key_of(teacher_cache.read_facts(folder)))[1],
        )
        tensors["counts"] = tensors["counts"][:-1]
        safetensors.torch.save_file(tensors, shard, metadata={"kdlib": json.dumps(told)})


@pytest.mark.parametrize("what", ["cut off", "empty", "not one of ours", "its numbers changed", "fewer windows"])
def test_a_damaged_shard_is_named(caches, tmp_path, what):
    _settings, folder = caches["vocab"]
    shutil.copytree(folder, tmp_path / "copy")
    damaged(tmp_path / "copy", what)
    with pytest.raises(ValueError, match=r"train-00001.safetensors of the teacher cache is damaged"):
        teacher = teacher_cache.CachedTeacher([tmp_path / "copy"])
        for place in range(len(teacher.shards.counts[""])):
            teacher.shards.window(place)


def test_shards_of_another_cache_are_refused(caches, tmp_path):
    shutil.copytree(caches["prefix"][1], tmp_path / "copy")
    shutil.copy(caches["all"][1] / "train-00000.safetensors", tmp_path / "copy")
    with pytest.raises(ValueError, match="is a shard of another teacher cache"):
        teacher_cache.CachedTeacher([tmp_path / "copy"])
    with pytest.raises(ValueError, match="hold parts of different teacher caches"):
        teacher_cache.CachedTeacher([caches["prefix"][1], caches["all"][1]])


def test_a_folder_is_never_mixed_up(caches, tmp_path):
    settings, folder = caches["prefix"]
    before = files_of(folder)
    with pytest.raises(ValueError, match=r"holds another teacher cache \(kd_top_k was 64, is 5\)"):
        written({**settings, "kd_top_k": 5}, folder)
    with pytest.raises(ValueError, match="holds another teacher cache"):
        written({**settings, "kd_top_k": 5}, tmp_path / "out", others=[folder])
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match="holds other files"):
        written(settings, tmp_path / "full")
    with pytest.raises(ValueError, match="give --teacher, not --teacher-cache"):
        written({**settings, "teacher_cache": str(folder)}, tmp_path / "out")
    assert files_of(folder) == before


def test_a_shard_holds_whole_documents(loaded):
    _, live, cached = loaded["prefix"]
    shards = cached.pair.teacher.facts["shards"]["train"]
    documents = [{live.train[place].document for place in range(*shard)} for shard in shards]
    assert len(shards) > 2 and not any(a & b for a, b in itertools.combinations(documents, 2))
    assert [place for shard in shards for place in range(*shard)] == list(range(len(live.train)))
    counts = [sum(len(live.train[place].student_rows) for place in range(*shard)) for shard in shards]
    assert min(counts[:-1]) >= SMALL


def test_a_disk_without_room_is_told_before_anything_is_written(caches, tmp_path, monkeypatch):
    settings, _ = caches["prefix"]
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=16 * 2**20 + 1000))
    with pytest.raises(ValueError, match=r"the cache needs \d+\.\d\d GB more"):
        written(settings, tmp_path / "out")
    assert not list((tmp_path / "out").glob("*"))


def test_where_memory_runs_out_the_batch_is_halved(caches, tmp_path, monkeypatch):
    settings, folder = caches["prefix"]
    ask = cache_writer.CacheWriter._compute_signals

    def short_of_memory(self, windows, wanted, tries, size):
        if size > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return ask(self, windows, wanted, tries, size)

    monkeypatch.setattr(cache_writer.CacheWriter, "_compute_signals", short_of_memory)
    assert written(settings, tmp_path / "out")[-1]["missing"] == 0
    ours, theirs = (safetensors.torch.load_file(f / "train-00000.safetensors") for f in (tmp_path / "out", folder))
    torch.testing.assert_close(ours["spans"], theirs["spans"], rtol=1e-4, atol=1e-4)


def test_the_command_writes_and_the_run_reads(caches, tmp_path, capsys):
    settings, _ = caches["prefix"]
    words = [w for name, value in settings.items() for w in (f"--{name.replace('_', '-')}", str(value))]
    assert cli.main(["cache", *words, "--out", str(tmp_path / "cache")]) == 0
    said = capsys.readouterr().out
    assert "token positions" in said and "bytes each" in said and "The cache is complete" in said
    assert cli.main(["cache", *words, "--out", str(tmp_path / "part"), "--writer", "2/3"]) == 0
    assert "other writers still have to write" in capsys.readouterr().out
    assert cli.main(["cache", *words, "--out", str(tmp_path / "merged"), "--resume", str(tmp_path / "part")]) == 0
    capsys.readouterr()
    assert cli.main(["cache", *words, "--out", str(tmp_path / "c"), "--writer", "4/3"]) == 2
    assert "--writer takes INDEX/COUNT" in capsys.readouterr().err
    assert (
        cli.main(["distill", *words, "--teacher-cache", str(tmp_path / "merged"), "--out", str(tmp_path / "run")]) == 0
    )
    assert cli.main(["evaluate", *words[:6], "--teacher-cache", str(tmp_path / "merged")]) == 2
    assert files.read_json(tmp_path / "run" / "verdict.json")["bits_per_byte"]["teacher"] > 0


def test_two_writers_may_begin_at_the_same_instant(settings, tmp_path, monkeypatch):
    """The second one opens the folder while the first is about to put its index there."""
    config, replace, begun = Config.from_dict(settings), os.replace, []
    loaded = inputs.load(config)
    first, second = (
        cache_writer.CacheWriter(config, loaded, tmp_path / "cache", Ticks(), [], (i, 2)) for i in range(2)
    )

    def meanwhile(path, there):
        if str(there).endswith(teacher_cache.INDEX) and not begun:
            begun.append(True)
            second._open(second.plan())
        replace(path, there)

    monkeypatch.setattr(os, "replace", meanwhile)
    first._open(first.plan())
    assert begun
    assert teacher_cache.read_facts(tmp_path / "cache") == first.facts
