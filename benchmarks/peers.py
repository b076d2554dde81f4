"""Losses that other projects have released, called on the tensors of `benchmarks.loss_head`.

Every peer runs forward and backward on student states hidden_ND and head weight_VD (both want gradients), teacher
states teacher_ND already in the student's width, and labels_N, the next token of each row; teacher logits come from the
student's head. hidden.grad and weight.grad then hold the gradient of 0.5 cross entropy + 0.5 KL(teacher || student) at
temperature 1, mean over rows; where a form computes something else, its docstring says what. All in plain torch.

    pip install torch==2.13.0 transformers accelerate datasets sentencepiece tiktoken blobfile kagglehub pillow
    pip install --no-deps trl==1.16.0 liger-kernel==0.8.5 torchtune==0.6.1 torchao==0.10.0 torchdata==0.11.0
    pip install --no-deps omegaconf==2.4.0 antlr4-python3-runtime==4.9.3

Call `warm(name)` before measuring: packages are imported inside the functions. torchtune 0.6.1 needs that old torchao.
"""

import functools
import sys
import types

import torch
import torch.nn.functional as F


def trl_gkd(hidden, weight, teacher, labels):
    """GKDTrainer's loss at beta 0, forward KL, with the labels that its trainer masks by, and plain cross entropy."""
    from trl.experimental.gkd.gkd_trainer import GKDTrainer

    logits, target = both_logits(hidden, weight, teacher)
    kd = GKDTrainer.generalized_jsd_loss(logits[None], target[None], labels[None], beta=0.0)
    (0.5 * F.cross_entropy(logits, labels) + 0.5 * kd).backward()


def trl_chunked(hidden, weight, teacher, labels):
    """DistillationTrainer's tiled divergence and SFTTrainer's tiled log-probabilities, at their own tile width."""
    from trl.kernels import ChunkedLogProbFunction
    from trl.kernels.chunked_divergence import VOCAB_CHUNK_SIZE, ChunkedDivergenceFunction

    kd, _ = ChunkedDivergenceFunction.apply(hidden, weight, None, teacher, weight.detach(), None, 0.0)
    log_probs = ChunkedLogProbFunction.apply(hidden, weight, None, labels, 1.0, VOCAB_CHUNK_SIZE, None, 1.0, ())[0]
    (0.5 * -log_probs.mean() + 0.5 * kd.mean()).backward()


def gold_uld(hidden, weight, teacher, labels):
    """0.5 cross entropy + 0.5 ULD instead of the KL: L1 between sorted probabilities, tokens paired by position."""
    gold(hidden, weight, teacher, labels)


def gold_uld_by_bytes(hidden, weight, teacher, labels):
    """As `gold_uld`, tokens paired by byte offsets: GOLD's default, although here every token stands against itself."""
    gold(hidden, weight, teacher, labels, by_bytes=True)


def gold_hybrid(hidden, weight, teacher, labels):
    """Forward KL (beta 0) on shared tokens, here all of them, so nothing is sorted; probabilities clamped at 1e-8."""
    gold(hidden, weight, teacher, labels, hybrid=True)


def gold_hybrid_by_bytes(hidden, weight, teacher, labels):
    """As `gold_hybrid`, tokens paired by byte offsets, GOLD's default."""
    gold(hidden, weight, teacher, labels, hybrid=True, by_bytes=True)


def gold(hidden, weight, teacher, labels, hybrid=False, by_bytes=False):
    """GOLD shifts labels by itself, so the sequence gets one more token in front and one unused row at the end."""
    loss_of = gold_loss(range(len(weight)), range(len(weight)), hybrid, by_bytes)
    logits, target = both_logits(F.pad(hidden, (0, 0, 0, 1)), weight, F.pad(teacher, (0, 0, 0, 1)))
    shifted, ids = F.pad(labels, (1, 0), value=-100)[None], F.pad(labels, (1, 0))[None]
    ends = torch.arange(ids.shape[1])
    offsets = torch.stack([ends - 1, ends], -1)[None]
    loss_of(logits[None], target[None], shifted, shifted, ids, ids, offsets, offsets).backward()


@functools.cache
def gold_loss(student_names, teacher_names, hybrid, by_bytes):
    """GOLD's loss for two vocabularies, ranges of names: tokens with a name in both are shared."""
    from trl.experimental.gold.gold_trainer import ULDLoss

    vocabularies = [{str(name): i for i, name in enumerate(names)} for names in (student_names, teacher_names)]
    tokenizers = [types.SimpleNamespace(get_vocab=lambda known=known: known) for known in vocabularies]
    config = types.SimpleNamespace(
        uld_crossentropy_weight=0.5,
        uld_distillation_weight=0.5,
        uld_student_temperature=1.0,
        uld_teacher_temperature=1.0,
        uld_skip_student_eos=False,
        uld_skip_teacher_eos=False,
        # The default, "observed", compares the rows after the ones that predict the answer; one token a group here.
        uld_token_merge_strategy="bayesian",
        use_extended_uld=by_bytes,
        uld_use_hybrid_loss=hybrid,
        uld_hybrid_matched_weight=None,
        uld_hybrid_unmatched_weight=None,
        beta=0.0,
    )
    return ULDLoss(config, *tokenizers)


def liger(hidden, weight, teacher, labels, chunk_size=1024):
    """Liger's fused linear JSD at beta 0, forward KL, with its own hard loss, not compiled."""
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    loss_of = LigerFusedLinearJSDLoss(0.5, 0.5, beta=0.0, compiled=False, chunk_size=chunk_size)
    loss_of(hidden, weight, teacher, weight.detach(), labels).backward()


def torchtune(hidden, weight, teacher, labels):
    """Its chunked CE and forward KL, 8 chunks; the KL's value lacks the teacher's entropy, its gradient is the same."""
    from torchtune.modules.loss import CEWithChunkedOutputLoss, ForwardKLWithChunkedOutputLoss

    ce_of, kd_of = CEWithChunkedOutputLoss(), ForwardKLWithChunkedOutputLoss()
    logits = [F.linear(rows, weight) for rows in hidden[None].chunk(ce_of.num_output_chunks, dim=1)]
    with torch.no_grad():
        target = [F.linear(rows, weight) for rows in teacher[None].chunk(kd_of.num_output_chunks, dim=1)]
    (0.5 * ce_of(logits, labels[None]) + 0.5 * kd_of(logits, target, labels[None])).backward()


def distillkit_form(hidden, weight, teacher, labels, temperature=1.0):
    """No release to install: its published form, written here. Full logits, masked KL times T^2, CE; all kept."""
    logits, target = both_logits(hidden, weight, teacher)
    student = F.log_softmax(logits.float() / temperature, -1)
    kd = F.kl_div(student, F.log_softmax(target.float() / temperature, -1), reduction="none", log_target=True).sum(-1)
    mask = (labels >= 0).float()
    kd = (kd * mask).sum() * temperature**2 / mask.sum()
    (0.5 * F.cross_entropy(logits, labels) + 0.5 * kd).backward()


def probs_at_embedding(hidden, weight, teacher, labels):
    """Another target: the teacher's vocabulary probabilities @ embedding (here the head), decoded by the head again."""
    logits = F.linear(hidden, weight)
    with torch.no_grad():
        target = F.linear(F.linear(teacher, weight).softmax(-1) @ weight, weight)
    kd = F.kl_div(logits.log_softmax(-1), target.log_softmax(-1), reduction="batchmean", log_target=True)
    (0.5 * F.cross_entropy(logits, labels) + 0.5 * kd).backward()


def torch_linear_cross_entropy(hidden, weight, teacher, labels, rows=256):
    """Cross entropy alone, at weight 1, `rows` rows a chunk; None leaves the chunk to torch (8 rows at N=768)."""
    from torch.nn import LinearCrossEntropyOptions

    way = LinearCrossEntropyOptions(batch_chunk_size=rows, chunking_method=None if rows else "auto")
    F.linear_cross_entropy(hidden, weight, labels, options=way).backward()


def both_logits(hidden, weight, teacher):
    with torch.no_grad():
        target = F.linear(teacher, weight)
    return F.linear(hidden, weight), target


PEERS = {
    "TRL GKD": trl_gkd,
    "TRL chunked": trl_chunked,
    "TRL GOLD ULD": gold_uld,
    "TRL GOLD ULD, by bytes": gold_uld_by_bytes,
    "TRL GOLD hybrid": gold_hybrid,
    "TRL GOLD hybrid, by bytes": gold_hybrid_by_bytes,
    "Liger, chunk 1024": liger,
    "Liger, chunk 128": functools.partial(liger, chunk_size=128),
    "torchtune chunked": torchtune,
    "DistillKit's form": distillkit_form,
    "naive probs @ embedding": probs_at_embedding,
    "torch linear_cross_entropy (CE only)": torch_linear_cross_entropy,
    "torch linear_cross_entropy, its own chunk (CE only)": functools.partial(torch_linear_cross_entropy, rows=None),
}


def warm(name):
    """Runs a peer once on a few numbers, so that its imports are neither timed nor counted as its memory."""
    hidden, weight, teacher = torch.ones(3, 8, 4)
    PEERS[name](hidden.requires_grad_(), weight.requires_grad_(), teacher, torch.arange(8))


def available():
    """Names of the peers whose packages import here; for the others the reason goes to stderr."""
    names = []
    for name in PEERS:
        try:
            warm(name)
            names.append(name)
        except (ImportError, OSError, RuntimeError) as problem:
            print(f"{name} is left out: {type(problem).__name__}: {problem}", file=sys.stderr)
    return names
