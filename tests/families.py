"""Small tokenizers of every kind that the alignment must cope with, trained on a few lines, and tiny random models."""

import functools

import tokenizers
import torch
import transformers
from tokenizers import decoders, normalizers, pre_tokenizers, processors, trainers
from tokenizers import models as kinds

from kdlib import demo
from kdlib.align import vocab
from kdlib.data import tokenize

LINES = [
    "The cat sat on the mat, and the dog looked at the cat.",
    "Return the first item of the list; raise ValueError if there is none.",
    "def read(path):\n    with open(path) as file:\n        return file.read()\n",
    "Il était une fois une très petite fille – naïve, “curieuse” et fière.",
    "東京は日本の首都です。 नमस्ते दुनिया 😀👩‍👩‍👧 done\r\n\tThe end.",
    "THE QUICK BROWN FOX jumps over the lazy dog 1234567890 times!",
] * 4


def _fast(core, **special):
    return transformers.PreTrainedTokenizerFast(tokenizer_object=core, **special)


def byte_level(size=330):
    return demo.byte_level_bpe(LINES, size)


def byte_level_trimmed():
    """GPT-2 as it comes: its offsets leave out white space at a token's edges."""
    tokenizer = demo.byte_level_bpe(LINES, 320)
    tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    return tokenizer


def byte_level_lower():
    core = demo.byte_level_bpe([line.lower() for line in LINES], 340).backend_tokenizer
    core.normalizer = normalizers.Lowercase()
    return _fast(core, eos_token="<|endoftext|>", pad_token="<|endoftext|>")


def unigram():
    return demo.unigram(LINES, 400)


def unigram_nfkc():
    core = demo.unigram(LINES, 380).backend_tokenizer
    core.normalizer = normalizers.NFKC()
    return _fast(core, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="</s>")


def sentencepiece_bpe():
    """Llama's kind: a space is put in front and marked, no pre-tokenizer, byte pieces, <s> in front."""
    special = ["<unk>", "<s>", "</s>"]
    byte_pieces = [f"<0x{byte:02X}>" for byte in range(256)]
    normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    core = tokenizers.Tokenizer(kinds.BPE())
    core.normalizer = normalizer
    core.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    core.train_from_iterator(LINES, trainers.BpeTrainer(vocab_size=200, show_progress=False))
    import json

    learned = json.loads(core.to_str())["model"]
    pieces = special + byte_pieces + sorted(learned["vocab"], key=learned["vocab"].get)
    merges = [tuple(merge) if isinstance(merge, list) else tuple(merge.split(" ")) for merge in learned["merges"]]
    bpe = kinds.BPE({p: i for i, p in enumerate(pieces)}, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    core = tokenizers.Tokenizer(bpe)
    core.normalizer = normalizer
    core.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    core.add_special_tokens(special)
    core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return _fast(core, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="</s>")


def word_piece():
    """BERT's kind: lower-cased, accents taken off, words without their spaces, [CLS] and [SEP] around."""
    core = tokenizers.Tokenizer(kinds.WordPiece(unk_token="[UNK]"))
    core.normalizer = normalizers.BertNormalizer(lowercase=True)
    core.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    core.decoder = decoders.WordPiece()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    core.train_from_iterator(
        LINES, trainers.WordPieceTrainer(vocab_size=300, special_tokens=special, show_progress=False)
    )
    core.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return _fast(core, unk_token="[UNK]", pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]")


FAMILIES = {
    "byte_level": byte_level,
    "byte_level_trimmed": byte_level_trimmed,
    "byte_level_lower": byte_level_lower,
    "unigram": unigram,
    "unigram_nfkc": unigram_nfkc,
    "sentencepiece_bpe": sentencepiece_bpe,
    "word_piece": word_piece,
}
LOSSLESS = ("byte_level", "byte_level_trimmed", "unigram", "sentencepiece_bpe")


@functools.cache
def reader(name):
    tokenizer = FAMILIES[name]()
    return tokenize.wrap_tokenizer(tokenizer, vocab.read_vocabulary(tokenizer))


def tiny_model(tokenizer, width=16, layers=2, seed=0, **changes):
    """A random Llama with as many rows as the tokenizer has tokens."""
    torch.manual_seed(seed)
    settings = {
        "vocab_size": len(tokenizer), "hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": layers,
        "num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 512, "initializer_range": 0.2,
        "pad_token_id": tokenizer.pad_token_id, "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id, "tie_word_embeddings": True,
    }  # fmt: skip
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**settings, **changes})).eval()


def qwen3(tokenizer, seed=1):
    torch.manual_seed(seed)
    return transformers.Qwen3ForCausalLM(transformers.Qwen3Config(
        vocab_size=len(tokenizer), hidden_size=24, intermediate_size=40, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=256, initializer_range=0.2, tie_word_embeddings=True,
    )).eval()  # fmt: skip


def gpt2(tokenizer, seed=2):
    torch.manual_seed(seed)
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(
        vocab_size=len(tokenizer), n_embd=20, n_layer=4, n_head=5, n_positions=256, initializer_range=0.2,
        attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0, bos_token_id=0, eos_token_id=0,
    )).eval()  # fmt: skip


def gpt_neox(tokenizer, seed=3):
    torch.manual_seed(seed)
    return transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig(
        vocab_size=len(tokenizer), hidden_size=24, intermediate_size=32, num_hidden_layers=5, num_attention_heads=3,
        max_position_embeddings=256, initializer_range=0.2, rotary_pct=0.5,
    )).eval()  # fmt: skip


ARCHITECTURES = {
    "llama": lambda tokenizer: tiny_model(tokenizer, 16, 3, num_attention_heads=4, num_key_value_heads=2),
    "qwen3": qwen3,
    "gpt2": gpt2,
    "gpt_neox": gpt_neox,
}
