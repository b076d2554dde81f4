"""Break the code in one classic way at a time; the ordinary tests must see each.

    python tests/mutations.py [WORD ...]     (all mutants, or those whose name holds one of the words)

Every mutant is a copy of the tree with one piece of one file replaced; the named test files run on it and must fail.
Exit status 1 where a mutant survives, or where the text it replaces no longer stands in the code exactly once.
"""

import concurrent.futures
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

HOUSE = Path(__file__).parent.parent
LOSSES, ALIGN, DATA, TRAIN = "test_losses.py", "test_align.py", "test_data.py", "test_train.py"
EVALUATE, VERDICT, VOCAB, SESSION = "test_evaluate.py", "test_verdict.py", "test_vocab.py", "test_session.py"
PARTS, ATTENTION = "test_parts.py", "test_attention.py"
CHECKPOINT, EMA, FAULTS, TIME = "test_checkpoint.py", "test_ema.py", "test_faults.py", "test_time.py"
RESUME, CACHE, AHEAD, BATCHING, WINDOWS = (
    "test_resume.py",
    "test_cache.py",
    "test_ahead.py",
    "test_batching.py",
    "test_windows.py",
)
CUT, CURVES = f"{RESUME}::test_a_run_cut_off_anywhere_ends_as_if_it_never_was[accumulation]", "[everything]"
CUT_ALL = CUT.replace("[accumulation]", CURVES)

# name: (file, what stands there, what stands there instead, tests that must fail)
MUTANTS = {
    "forward KL turned round": ("losses.py", "return _kl(teacher_NV, student_NV)\n\n\ndef reverse", "return _kl(student_NV, teacher_NV)\n\n\ndef reverse", [LOSSES]),
    "reverse KL turned round": ("losses.py", "return _kl(student_NV, teacher_NV)\n\n\ndef jsd", "return _kl(teacher_NV, student_NV)\n\n\ndef jsd", [LOSSES]),
    "JSD's middle not halved": ("losses.py", "torch.logaddexp(student_NV, teacher_NV) - LN2", "torch.logaddexp(student_NV, teacher_NV)",
                                [LOSSES]),
    "JSD of one side twice": ("losses.py", "0.5 * (_kl(teacher_NV, middle) + _kl(student_NV, middle))",
                              "0.5 * (_kl(teacher_NV, middle) + _kl(teacher_NV, middle))", [LOSSES]),
    "skew on the wrong side": ("losses.py", "return _kl(teacher_NV, _mixture(teacher_NV, student_NV))",
                               "return _kl(teacher_NV, _mixture(student_NV, teacher_NV))", [LOSSES]),
    "T squared forgotten": ("losses.py", "return temperature**2 * DIVERGENCES", "return DIVERGENCES", [LOSSES]),
    "temperature on one side only": ("parts.py", "theirs = losses.log_probs(rows.other.detach(), temperature)",
                                     "theirs = losses.log_probs(rows.other.detach())", [TRAIN]),
    "temperature ignored": ("losses.py", "logits_NV if temperature == 1.0 else logits_NV / temperature", "logits_NV", [LOSSES]),
    "softmax in half precision": ("losses.py", "return tensor if tensor.dtype == torch.float64 else tensor.float()",
                                  "return tensor", [LOSSES]),
    "the tail left out": ("losses.py", "    return (sums + EMPTY).log()", "    return (sums + EMPTY).log()[:, :-1]", [LOSSES]),
    "buckets of log-probabilities": ("losses.py", "log_probs_NV.exp())", "log_probs_NV)", [LOSSES]),
    "mean over the micro-batch": ("losses.py", "values_N.sum() / max(1, num_positions)", "values_N.mean()", [LOSSES, TRAIN]),
    "sum over positions": ("losses.py", "values_N.sum() / max(1, num_positions)", "values_N.sum()", [LOSSES]),
    "ignored labels count": ("losses.py", "ignore_index=-100", "ignore_index=0", [LOSSES]),
    "smoothing ignored": ("losses.py", "if not smoothing:", "if True:", [LOSSES]),
    "labels not shifted": ("data.py", "np.where(learned, np.append(ids[1:], 0), IGNORE)", "np.where(learned, ids, IGNORE)", [DATA]),
    "labels shifted the wrong way": ("data.py", "np.where(learned, np.append(ids[1:], 0), IGNORE)",
                                     "np.where(learned, np.append(0, ids[:-1]), IGNORE)", [DATA]),
    "teacher rows off by one": ("data.py", "teacher_rows=rows[1] + len(teacher_prefix)",
                                "teacher_rows=rows[1] + len(teacher_prefix) + 1", [DATA]),
    "BOS forgotten in the rows": ("data.py", "student_rows=rows[0] + len(student_prefix)", "student_rows=rows[0]", [DATA]),
    "teacher fed student ids": ("batching.py", '_side(windows, "teacher", theirs', '_side([dataclasses.replace(w, teacher_ids=w.student_ids, teacher_labels=w.student_labels, teacher_scored=w.student_scored) for w in windows], "teacher", theirs', [DATA, TRAIN]),
    "rows of a batch not moved": ("batching.py", "[row * shape[1] + start for row, start, _ in spots]", "[start for row, start, _ in spots]", [DATA]),
    "prompts learned too": ("data.py", "return Encoded(ids, spans.ends + base, spans.boundary, spans.faithful, lengths, every, every & learn)",
                            "return Encoded(ids, spans.ends + base, spans.boundary, spans.faithful, lengths, every, every)", [DATA]),
    "padding not masked": ("batching.py", "(pad, np.int64), (0, np.int64),", "(pad, np.int64), (1, np.int64),", [DATA]),
    "boundaries inside characters": ("align.py", "alone & _between_characters(data, ends) & _last_with_its_end(ends)",
                                     "alone & _last_with_its_end(ends)", [ALIGN]),
    "first of several tokens at one end": ("align.py", "(np.diff(ends, append=-1) != 0)", "(np.diff(ends, prepend=-1) != 0)",
                                           [ALIGN]),
    "pairs by index": ("align.py", "return Alignment(ours[left], theirs[right], ends, usable)",
                       "return Alignment(ours[left], ours[left], ends, usable)", [ALIGN]),
    "offsets believed unseen": ("align.py", "faithful = _agrees(data, said, ends, vocabulary.adds_space)",
                                "faithful = np.ones(len(said), bool)", [ALIGN]),
    "own token checked, not the next": ("align.py", "[positions + 1]", "[positions]", [ALIGN]),
    "leading spaces dropped in the match": ("vocab.py", 'return piece.replace(MARK, " ").encode()',
                                            'return piece.replace(MARK, "").encode()', [VOCAB, ALIGN]),
    "special tokens speak": ("vocab.py", "if index not in silent:", "if True:", [VOCAB]),
    "prefix buckets without the way on": ("vocab.py", "own[index] = other[first[index]]", "pass", [VOCAB]),
    "padding rows keep their mass": ("models.py", "if len(weight) > self.num_rows:", "if False:",
                                     ["test_models.py", "test_projector.py"]),
    "only the last chunk's head gradient": ("fused.py", "into_weight.addmm_(gradient.T, states, beta=float(rows.start > 0))",
                                            "into_weight.copy_(gradient.T @ states)", ["test_fused.py"]),
    "few rows under a wide head": ("fused.py", "wanted = max(FULL_ROWS, int(", "wanted = max(0, int(", ["test_fused.py"]),
    "the scaler's factor ignored": ("fused.py", "(g if whole else g.mul_(scale)).to(d)", "g.to(d)", ["test_fused.py"]),
    "half precision gradients not lifted": ("fused.py", "if compute != torch.float16:", "if True:", ["test_fused.py"]),
    "the bias of the head without gradient": ("fused.py", "into_bias += gradient.sum(dim=0)", "pass", ["test_fused.py"]),
    "weights of the parts forgotten in the gradient": ("fused.py", "torch.autograd.grad((found * found.new_tensor(weights)).sum(), leaves", "torch.autograd.grad(found.sum(), leaves", ["test_fused.py"]),
    "teacher rows of another chunk": ("fused.py", "theirs = None if others is None else others[block.known.start - known : block.known.stop - known].detach()",
                                      "theirs = None if others is None else others[: block.known.stop - block.known.start].detach()", ["test_fused.py", TRAIN]),
    "a stale copy of the tied head": ("models.py", "self.module = model.get_output_embeddings()",
                                      "import copy; self.module = copy.deepcopy(model.get_output_embeddings())",
                                      ["test_projector.py", TRAIN]),
    "teacher in training mode": ("teacher.py", "self.model = model.eval().requires_grad_(False)",
                                 "self.model = model.train().requires_grad_(False)", [TRAIN]),
    "teacher with gradients": ("teacher.py", ".requires_grad_(False)", "", [TRAIN]),
    "KD trains the projector": ("parts.py", "rows.other.detach()", "rows.other", [TRAIN]),
    "the projector's loss in the student's total": ("objective.py", "for n, p in self.parts.items() if p.student and weights[n] > 0}",
                                                    "for n, p in self.parts.items() if weights[n] > 0}", [TRAIN]),
    "KD over all rows' labels": ("parts.py", '"shared_prefix": {"kd": Part(shared_tokens, "aligned")}',
                                 '"shared_prefix": {"kd": Part(shared_tokens, "labels")}', [TRAIN]),
    "projector not in the optimizer": ("optimizer.py", "beside = list(objective.beside.parameters())", "beside = []", [TRAIN]),
    "one clip for both": ("train.py", "torch.nn.utils.clip_grad_norm_(objective.student.parameters(), limit)",
                          "torch.nn.utils.clip_grad_norm_(objective.parameters(), limit)", [TRAIN]),
    "zero_grad forgotten": ("train.py", "        self.scheduler.step()\n        self.optimizer.zero_grad()\n", "        self.scheduler.step()\n", [TRAIN]),
    "scheduler counts micro-batches": ("train.py", "        self.scheduler.step()\n", "        [self.scheduler.step() for _ in range(self.config.grad_accumulation)]\n",
                                       [TRAIN]),
    "scheduler not stepped": ("train.py", "        self.scheduler.step()\n", "", [TRAIN]),
    "bits in nats": ("evaluate.py", "self.nats.sum() / LN2 / max", "self.nats.sum() / max", [EVALUATE]),
    "all labels scored": ("evaluate.py", "batch.student_windows * batch.student_scored", "batch.student_windows", [EVALUATE]),
    "perplexity of the scored tokens' sum": ("evaluate.py", "self.token_nats / max(1, self.num_tokens)",
                                             "self.token_nats / max(1, self.bytes.sum())", [EVALUATE]),
    "gain with the wrong sign": ("verdict.py", "np.atleast_2d(control_bits) - np.atleast_2d(distilled_bits)",
                                 "np.atleast_2d(distilled_bits) - np.atleast_2d(control_bits)", [VERDICT]),
    "runs counted as documents": ("verdict.py", "by_run.var(ddof=1) / num_runs", "by_run.var(ddof=1) / num_documents", [VERDICT]),
    "unclear called helped": ("verdict.py", "if low > 0:", "if high > 0:", [VERDICT]),
    "control from the distilled weights": ("course.py", "        models.put_back(self.pair.student, self.start_weights)\n        accelerate",
                                           "        accelerate", [SESSION]),
    "the last weights scored, not the best": ("leg.py", "            models.put_back(self.pair.student, weights)\n",
                                              "", [SESSION]),
    "the verdict on the validation text": ("leg.py", '"test": loaded.test}', '"test": loaded.validation}', [SESSION]),
    "copies of a document on both sides": ("corpus.py", "1 + held[document.key] % 2 if", "1 + len(parts[1]) % 2 if",
                                           ["test_corpus.py"]),
    "unknown keys swallowed": ("config.py", "if name not in known:\n                raise", "if name not in known:\n                continue\n                raise",
                               ["test_config.py"]),
    "top-k: duplicates counted twice": ("losses.py", ".masked_fill(again_NK, math.log(EMPTY))", "", [LOSSES]),
    "top-k: the tail forgotten": ("losses.py", "return torch.cat([kept, (rest + EMPTY).log()], dim=-1)", "return kept", [LOSSES]),
    "top-k: the subset renormalised": ("losses.py", "return torch.cat([kept, (rest + EMPTY).log()], dim=-1)",
                                       "return log_probs(torch.cat([kept, rest * 0 - 69.0], dim=-1))", [LOSSES]),
    "top-k of one side only": ("losses.py", "student_NV.topk(k, dim=-1).indices", "teacher_NV.topk(k, dim=-1).indices", [LOSSES]),
    "top-k: student's mass told for the teacher's": ("losses.py", "teacher[:, :-1].exp()", "student[:, :-1].exp()", [LOSSES]),
    "spans without the other outcome": ("losses.py", "return torch.stack([this, torch.where(near, small, large)], dim=-1)",
                                        "return torch.stack([this, this], dim=-1)", [LOSSES]),
    "spans: T forgotten": ("losses.py", "return temperature * DIVERGENCES[divergence](", "return DIVERGENCES[divergence](", [LOSSES]),
    "spans: sums with the wrong sign": ("losses.py", "return -sums.index_add", "return sums.index_add", [LOSSES]),
    "cosine without its 1": ("losses.py", "return 1.0 - F.cosine_similarity", "return -F.cosine_similarity", [LOSSES]),
    "cosine over the wrong axis": ("losses.py", "F.cosine_similarity(student_ND, teacher_ND, dim=-1)",
                                   "F.cosine_similarity(student_ND, teacher_ND, dim=0).mean().expand(len(student_ND))", [LOSSES, PARTS]),
    "InfoNCE of the other axis": ("losses.py", "F.normalize(wide(teacher_ND), dim=-1).T", "F.normalize(wide(teacher_ND), dim=0).T", [LOSSES]),
    "InfoNCE over the teacher's side": ("losses.py", "return -log_probs(alike, temperature)", "return -log_probs(alike.T, temperature)", [LOSSES]),
    "negatives from other windows": ("parts.py", "zip(mapped.split(match.by_window), target.split(match.by_window), strict=True)",
                                     "[(mapped, target)]", [PARTS]),
    "attention that sees the future": ("attention.py", "(span_of > 0) & (tokens <= ends_K[1:, None])", "(span_of > 0).expand(num_ends - 1, -1)", [ATTENTION]),
    "the sink in front kept": ("attention.py", "(span_of > 0) & (tokens", "(span_of >= 0) & (tokens", [ATTENTION]),
    "attention scaling dropped": ("attention.py", "(query_HKD[:, 1:] * scaling)", "query_HKD[:, 1:]", [ATTENTION]),
    "grouped keys in the wrong order": ("attention.py", "key_HSD.repeat_interleave(len(query_HKD) // len(key_HSD), dim=0)",
                                        "key_HSD.repeat(len(query_HKD) // len(key_HSD), 1, 1)", [ATTENTION]),
    "spans pooled off by one": ("attention.py", "torch.searchsorted(ends_K, tokens)", "torch.searchsorted(ends_K, tokens, right=True)", [ATTENTION]),
    "relations that look ahead": ("attention.py", ".triu(1)", ".triu(100)", [ATTENTION]),
    "relations not scaled": ("attention.py", " / math.sqrt(width // num_heads)", "", [ATTENTION]),
    "no mask for the watched attention": ("hooks.py", "transformers.AttentionMaskInterface.register", "(lambda *_: None)", [ATTENTION]),
    "hooks left behind": ("hooks.py", "            handle.remove()", "            pass", [ATTENTION]),
    "queries of another layer": ("hooks.py", "for index in attention for module in stack[index].modules()",
                                 "for index in attention for module in stack[index - 1].modules()", [ATTENTION]),
    "layer states before the layer": ("models.py", "seen.layers[i].flatten(0, 1)[rows] for i in taps.layers", "last.flatten(0, 1)[rows] for i in taps.layers", [ATTENTION]),
    "outliers not standardised": ("projector.py", "return (vectors_ND.to(self.mean.dtype) - self.mean) / self.spread", "return vectors_ND.float()", [PARTS]),
    "features in half precision": ("objective.py", "with torch.autocast(match.state.device.type, enabled=False):", "if True:", [PARTS]),
    "the router's target without its mixture": ("router.py", "(weights.unsqueeze(-1) * told).sum(dim=1)", "told[:, 0]", [PARTS]),
    "a router that can shut a layer out": ("router.py", "FLOOR / len(layers) + (1.0 - FLOOR) * free", "free", [PARTS]),
    "the student asks for an easier layer": ("router.py", "F.linear(state.detach(), self.gate)", "F.linear(state, self.gate)", [PARTS]),
    "maps and router not in the optimizer": ("objective.py", "torch.nn.ModuleDict(beside or {})", "torch.nn.ModuleDict({})", [PARTS, TRAIN]),
    "layers mapped by index": ("inputs.py", "max(0, round((i + 1) * theirs / ours) - 1)", "min(i, theirs - 1)", [PARTS]),
    "first layers' attention": ("inputs.py", "tuple(range(ours - last, ours))", "tuple(range(last))", [PARTS]),
    "spans over changed tokens": ("data.py", "told = student.faithful & student.is_text & student.learn", "told = student.is_text & student.learn", [PARTS]),
    "spans off by one": ("data.py", "np.diff(n[end + 1]) == 0", "np.diff(n[end]) == 0", [PARTS]),
    "spans cut by a chunk": ("objective.py", "fused.lay_out(~inside | known, known,", "fused.lay_out(known | True, known,", [PARTS]),
    "teacher's spans a token late": ("teacher.py", "inside = batch.teacher_rows[span_of] + torch", "inside = 1 + batch.teacher_rows[span_of] + torch", [PARTS]),
    "spans averaged over all positions": ("parts.py", 'Part(chunk_likelihood, "spans")', 'Part(chunk_likelihood, "aligned")', [PARTS]),
    "temperature on tokens, not on buckets": ("parts.py", "return told if temperature == 1.0 else losses.log_probs(told, temperature)", "return told", [PARTS]),
    "features at every position": ("objective.py", "Match(seen, signal, hidden[batch.student_rows], by_window)",
                                   "Match(seen, signal, hidden[batch.student_rows - 1], by_window)", [PARTS]),
    "curriculum by absolute steps": ("train.py", "self._weights(self.step / self.num_steps)", "self._weights(self.step / 1000)", [PARTS]),
    "curriculum with a jump": ("schedule.py", "return x * x * (3.0 - 2.0 * x)", "return float(x > 0)", [TRAIN]),
    "balance by yesterday's share": ("schedule.py", "unit * self.targets[n] * factors[n] / self.values[n]", "unit * self.targets[n] * factors[n]", [TRAIN]),
    "a bad step taken": ("train.py", "            self.optimizer.zero_grad()  # without gradients", "            pass  # without gradients", [TRAIN, FAULTS]),
    "bad gradients not seen": ("train.py", "if not math.isfinite(norm):", "if False:", [TRAIN]),
    "bad steps for ever": ("train.py", "self.in_a_row = self.in_a_row + 1 if skipped else 0", "self.in_a_row = 0", [TRAIN]),
    "gradient shares of unweighted parts": ("objective.py", "lifted = LIFT * weights[name] * values[name]", "lifted = LIFT * values[name]", [PARTS]),
    "dominance of the wrong side": ("alerts.py", "if share > DOMINANT:", "if share < DOMINANT:", ["test_alerts.py"]),
    "a plateau by the total": ("alerts.py", "if name in self.parts[0][1] and name in record", "if name in record", ["test_alerts.py"]),
    "random numbers begin anew": ("train.py", 'seeds.put_back(tensors["random"], self.accelerator)', "pass", [CUT]),
    "python's random numbers forgotten": ("seeds.py", "random.setstate(", "(lambda *_: None)(", ["test_seeds.py"]),
    "the optimizer's moments forgotten": ("optimizer.py", "state.setdefault(int(index), {})[name] = tensor.item() if counts else tensor", "pass", [CUT]),
    "the text begins anew": ("train.py", "per_step, self.config.seed, self.step)", "per_step, self.config.seed, 0)", [CUT]),
    "an epoch begun in the middle begins anew": ("train.py", "order[passed if epoch == first else 0 :]", "order", [TRAIN]),
    "the schedule begins anew": ("train.py", 'self.scheduler.load_state_dict(facts["scheduler"])', "pass", [CUT]),
    "the average begins anew": ("train.py", 'models.put_back(self.average.module, tensors["average"])', "pass", [CUT_ALL]),
    "the average's count begins anew": ("train.py", 'self.average.n_averaged.fill_(facts["num_averaged"])', "pass", [CUT_ALL]),
    "the balance begins anew": ("train.py", 'self.balance.values = dict(facts["balance"])', "pass", [CUT_ALL]),
    "maps and buffers begin anew": ("train.py", 'models.put_back(self.objective.beside, tensors.get("beside", {}))', "pass", [CUT_ALL]),
    "the best weights forgotten": ("course.py", 'groups.get(f"best_{place}")', "None", [f"{RESUME}::test_the_best_weights_may_lie_before_the_cut"]),
    "what the watch saw forgotten": ("leg.py", "                list(leg.watch.see(record))", "                pass", [f"{RESUME}::test_signs_that_build_up_over_two_sessions_are_told_once"]),
    "records of lost steps kept": ("resume.py", 'folder.records.cut(found.facts["records_bytes"] if found.facts else 0)', "pass", [f"{RESUME}::test_a_broken_checkpoint_is_told_and_the_one_before_is_taken"]),
    "checksums not compared": ("checkpoint.py", 'if _hash(file) != told["sha256"]:', "if False:", [CHECKPOINT]),
    "an unsigned manifest": ("checkpoint.py", "written == _hash_of(listed) and", "", [CHECKPOINT]),
    "a half-written checkpoint left behind": ("checkpoint.py", "        shutil.rmtree(beside, ignore_errors=True)\n        if isinstance", "        if isinstance", [CHECKPOINT]),
    "room not looked for": ("checkpoint.py", "if free >= num_bytes + reserve_bytes:", "if True:", [CHECKPOINT]),
    "the newest goes first": ("checkpoint.py", "[:-count]", "[count:]", [CHECKPOINT]),
    "written under its own name": ("checkpoint.py", 'beside = folder / (folder_name(step) + ".tmp")', "beside = folder / folder_name(step)", ["test_kill.py::test_a_killed_run_goes_on"]),
    "another student is no matter": ("identity.py", '"student": of_model(student)', '"student": ""', [f"{RESUME}::test_a_checkpoint_of_another_run_is_refused_and_the_difference_told[student]"]),
    "the second student goes on with the first one's state": ("course.py", "if not self.legs[-1].done:", "if True:", [f"{RESUME}::test_a_run_cut_off_between_two_students_goes_on_with_the_second"]),
    "any key may change": ("identity.py", "and key not in HARMLESS", "and False", [f"{RESUME}::test_a_checkpoint_of_another_run_is_refused_and_the_difference_told[config]"]),
    "no lock": ("records.py", "fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)", "pass", [f"{RESUME}::test_two_processes_never_work_on_one_folder"]),
    "a full disk fails the run": ("session.py", "error.errno in records.FULL:", "False:", [f"{RESUME}::test_a_full_disk_pauses_the_run_with_its_last_checkpoint"]),
    "signals not heard": ("session.py", "        self.interrupts.listen()\n", "", ["test_kernel.py::test_an_interrupted_cell_ends_as_if_it_was_through"]),
    "weights that are no numbers saved": ("session.py", "if not self.course.training.is_finite():", "if False:", [FAULTS]),
    "gradients of a failed try kept": ("train.py", "            self.optimizer.zero_grad()\n            memory.let_go()", "            memory.let_go()", [FAULTS]),
    "a half-taken update taken again": ("train.py", "or self._num_updates() != before:", "or False:", [FAULTS]),
    "windows dropped with the halves": ("train.py", "for i in range(0, len(mine), micro_batch)]", "for i in range(0, len(mine) // 2, micro_batch)]", [FAULTS, TRAIN]),
    "an average of bad steps": ("train.py", "if self.average and not skipped:", "if self.average:", [FAULTS]),
    "the average without its warm-up": ("ema.py", "min(decay, (1.0 + num_averaged) / (10.0 + num_averaged))", "decay", [EMA]),
    "the average turned round": ("ema.py", "weight = 1.0 - decay_at", "weight = decay_at", [EMA]),
    "the average never chosen": ("course.py", "if self.training.average and leg.step:", "if False:", [EMA]),
    "no margin": ("budget.py", "return self.left() >= self.cost(*tasks) + self.margin()", "return self.left() >= 0", [TIME]),
    "evaluations to their end": ("session.py", 'if self.budget.left() < self.budget.cost("batch", "save") + 0.5 * self.budget.margin():', "if False:", [TIME]),
    "a step before the first look at the clock": ("course.py", "        yield self._room(leg)\n        yield from self._duties(leg)\n", "        yield from self._duties(leg)\n", [TIME]),
    "the plan forgets evaluations": ("plan.py", 'evaluations * expected("evaluate") + tests', "tests", [TIME]),
    "the session's age unknown": ("session.py", "clock.now() - env.session_age_s()", "clock.now()", [TIME]),
    "windows of a row see each other": ("attention.py", "(windows_BL[:, :, None] == windows_BL[:, None, :]) & past", "past.expand(len(windows_BL), -1, -1)", [BATCHING]),
    "positions that go on through a row": ("attention.py", "(places - firsts) * (windows_BL > 0)", "places", [BATCHING]),
    "maps over a whole row": ("models.py", "query[row][:, start + ends], key[row, :, start:stop]", "query[row][:, ends], key[row]", [BATCHING]),
    "a packed row taken for a plain one": ("models.py", "packed=len(spots) > len(ids))", "packed=False)", [BATCHING]),
    "a teacher's windows each in a row": ("batching.py", "theirs = lay_out([len(w.teacher_ids) for w in windows], widest[1])", "theirs = [[k] for k in range(len(windows))]", [BATCHING]),
    "windows in the order that was given": ("batching.py", "windows, place = [windows[i] for i in order], iter", "windows, place = list(windows), iter", [BATCHING]),
    "a probe too short for a sliding window": ("models.py", "torch.randint(model.config.vocab_size, (2, length),", "torch.randint(model.config.vocab_size, (2, 8),", [BATCHING]),
    "a model that can't pack packs": ("models.py", "return bool((moved < SHARED_TOLERANCE", "return True or bool((moved < SHARED_TOLERANCE", [BATCHING]),
    "one side's probe for both": ("inputs.py", "found.append(2 * longest if fits else 0)", "found.append(2 * longest if fits or not found else 0)", [BATCHING]),
    "rows as wide as they like": ("batching.py", "if width <= widest and", "if", [BATCHING]),
    "wide rows for nothing": ("batching.py", "return num_rows * width * (1.0 + width / WIDE_ROW)", "return num_rows * width", [BATCHING]),
    "the shortest window first": ("batching.py", "key=lambda i: -lengths[i]", "key=lambda i: lengths[i]", [BATCHING]),
    "steps alike on one side": ("batching.py", "np.argmax(both.std(axis=1) / both.mean(axis=1))", "0", [BATCHING]),
    "the longest windows always left out": ("batching.py", "random.permutation(len(windows))[: num_steps * per_step]", "np.argsort(lengths[0])[: num_steps * per_step]", [BATCHING]),
    "halves with each other's signals": ("evaluate.py", "signal.rows(torch.cat([rows[half][i] for i in batches[-1].order]))", "signal.rows(torch.cat(rows[half]))", [BATCHING]),
    "held-out windows in the order that was given": ("evaluate.py", "    groups = [[group[i] for i in batch.order] for group, batch in zip(groups, batches, strict=True)]\n", "", [BATCHING]),
    "padding not told": ("batching.py", "return self.student_ids.numel()", "return self.num_student_tokens", [BATCHING]),
    "a control with its teacher": ("config.py", 'return self.replace(kd_method="none", kd_top_k=0,', "return self.replace(kd_top_k=0,", ["test_config.py", SESSION]),
    "top tokens from the tail too": ("teacher.py", "told[:, :-1].topk(", "told.topk(", [CACHE]),
    "top tokens without temperature": ("teacher.py", "        if self.temperature != 1.0:\n", "        if False:\n", [CACHE]),
    "teacher ids for student ids": ("teacher.py", "TopTokens(self.student_ids.to(device)[likeliest], ", "TopTokens(likeliest, ", [CACHE]),
    "cut tokens forgotten": ("teacher.py", "tail = self.log_probs[:, k:].logsumexp(dim=-1, keepdim=True)", "tail = self.log_probs[:, -1:]", [CACHE]),
    "the kept tokens in the tail too": ("losses.py", "rest = log_probs_NV.exp().scatter(1, ids_NK, 0.0)", "rest = log_probs_NV.exp()", [CACHE]),
    "a window's signal a position late": ("signals.py", "start = int(self.start_of[place]) if count else 0", "start = int(self.start_of[place]) + 1 if count else 0", [CACHE]),
    "shards by windows, not documents": ("signals.py", " and begins_document:", ":", [f"{CACHE}::test_a_shard_holds_whole_documents"]),
    "signals in the order of lengths": ("cache.py", "return [found[place] for place in range(len(windows))]", "return list(found.values())", [CACHE]),
    "a shard without its checksum": ("signals.py", "if _hash(file.get_tensor(name)) != told:", "if False:", [CACHE]),
    "any shard will do": ("signals.py", 'if told["key"] != key:', "if False:", [CACHE]),
    "any text will do": ("signals.py", "            if ours != held:\n                raise ValueError(\n                    f\"the teacher cache is of", "            if False:\n                raise ValueError(\n                    f\"the teacher cache is of", [CACHE]),
    "a shard written in place": ("signals.py", 'beside = Path(f"{path}.{writer}.tmp")', "beside = Path(path)", [CACHE]),
    "kd over all of the teacher's own k": ("parts.py", "top = rows.top.cut(config.kd_top_k) if config.kd_top_k else rows.top", "top = rows.top", [CACHE]),
    "rounded numbers no distribution": ("signals.py", '        found["log_probs"] -= sums', "        pass", [CACHE]),
    "any batch taken for the one asked for": ("ahead.py", "asked[:2] != (batch.stamp, wants)", "asked[1] != wants", [AHEAD]),
    "less taken than was wanted": ("ahead.py", "asked[:2] != (batch.stamp, wants)", "asked[0] is not batch.stamp", [AHEAD]),
    "nothing asked for": ("train.py", "self.teacher.ask(later[i][0], **later[i][1])", "pass", [AHEAD]),
    "the teacher asked too late": ("train.py", "if self.asks and i < len(later):", "if self.asks and i < len(later) - 1:", [AHEAD]),
    "the teacher's head far away": ("inputs.py", '"teacher_head": pair.teacher.near', '"teacher_head": pair.teacher.head', [AHEAD]),
    "asked for past the last step": ("train.py", "if self.step + 1 >= self.num_steps:", "if False:", [AHEAD]),
    "the next step's phase unknown": ("train.py", "self._weights((self.step + 1) / self.num_steps)", "self._weights(0.0)", [AHEAD]),
    "what was asked for is kept": ("train.py", "                self.teacher.forget()", "                pass", [AHEAD]),
    "one card taken for two": ("precision.py", "count > 1", "count > 0", [AHEAD]),
    "half a pass taken for whole": ("windows.py", "if any((folder / name).stat().st_size != size for name, size in files.items()):", "if False:", [WINDOWS]),
    "what a killed pass left stays": ("windows.py", "            _clear(folder)\n            _write", "            _write", [WINDOWS]),
    "what a failed pass left stays": ("windows.py", "            _clear(folder)\n            raise", "            raise", [WINDOWS]),
    "windows named by their text alone": ("windows.py", "facts = [used.backend_tokenizer.to_str(), ", "facts = [", [WINDOWS]),
    "a name that forgets the template": ("windows.py", "marks = used.chat_template, ", "marks = ", [WINDOWS]),
    "a name that forgets the length": ("windows.py", "repr((FORMAT, versions, max_length))", "repr((FORMAT, versions))", [WINDOWS]),
    "made again by who waited": ("windows.py", "if (table := _kept(folder)) is not None:", "if False:", [WINDOWS]),
    "a cache that must take it": ("windows.py", "    except OSError as error:", "    except ZeroDivisionError as error:", [WINDOWS]),
    "windows by the row of their batch": ("windows.py", "slice(place - self._starts[which], 1)", "slice(place, 1)", [WINDOWS]),
    "windows without a place": ("windows.py", "**numbers, place=place)", "**numbers)", [WINDOWS]),
    "labels that run into the next batch": ("windows.py", "yield np.append(ids[1:], 0)[learned]", "yield ids[learned]", [WINDOWS]),
    "a hash without its windows": ("windows.py", "digest.update(_numbers(batch.column(name).value_lengths()).tobytes())", "pass", [WINDOWS]),
    "counts of the last document only": ("windows.py", "[: len(cut)]", "[: len(cut) - 1] + [[0] * 4]", [WINDOWS]),
    "an environment left changed": ("env.py", "        os.environ = environment  # noqa", "        pass  # noqa", [WINDOWS]),
    "documents numbered anew in each process": ("windows.py", '"number": [number for number, _ in batch]', '"number": [0 for number, _ in batch]', [WINDOWS]),
}  # fmt: skip


def survives(name):
    """Whether the named tests still pass on the mutant; a text to say where it can't be made."""
    file, old, new, tests = MUTANTS[name]
    source = (HOUSE / "kdlib" / file).read_text(encoding="utf-8")
    if source.count(old) != 1:
        return f"{file} holds the text {source.count(old)} times"
    with tempfile.TemporaryDirectory() as copy:
        for folder in ("kdlib", "tests"):
            shutil.copytree(HOUSE / folder, Path(copy) / folder, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(HOUSE / "pyproject.toml", copy)
        (Path(copy) / "kdlib" / file).write_text(source.replace(old, new), encoding="utf-8")
        ran = subprocess.run(
            [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *(f"tests/{test}" for test in tests)],
            cwd=copy, env={**os.environ, "PYTHONPATH": copy, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
            timeout=600,
        )  # fmt: skip
    if ran.returncode not in (0, 1):
        return f"the tests did not run: {(ran.stdout + ran.stderr)[-300:]}"
    return "survived" if ran.returncode == 0 else ""


def main(words):
    names = [name for name in MUTANTS if not words or any(word in name for word in words)]
    failed = 0
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        for name, problem in zip(names, pool.map(survives, names), strict=True):
            failed += bool(problem)
            print(f"{'caught  ' if not problem else 'PROBLEM '} {name}{': ' + problem if problem else ''}", flush=True)
    print(f"{len(names) - failed} passed, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
