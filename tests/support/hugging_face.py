"""Small Hugging Face tokenizers of five families, and texts for them."""

import json
from collections.abc import Callable, Sequence
from typing import Any

import tokenizers
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from megatron_eso.data.tokenizers.hugging_face_cuts import _PATTERNS
from megatron_eso.data.tokenizers.tokenizer import Tokenizer

SENTENCES = [
    "The quick brown fox doesn't jump over 12 lazy dogs.",
    "  def f(x):\n\treturn x + 1  # twice\n\n",
    "Zo\u00eb sah 3 B\u00e4ren; \u00c9COLE, \u6f22\u5b57 \U0001f600!",
]

TEXT = " ".join(SENTENCES)

ANY_TEXT = st.text(
    st.one_of(
        st.sampled_from([*"ab T1.,'!\n\t\r ", "\u00a0", "\u3000", "\u0301", "\u00e9", "\ufb01"]),
        st.characters(exclude_categories=["Cs"]),
    ),
    max_size=60,
)


def train(model: Any, trainer: Any, special: Sequence[str], **parts: Any) -> tokenizers.Tokenizer:
    tokenizer = tokenizers.Tokenizer(model)
    for name, part in parts.items():
        setattr(tokenizer, name, part)
    trainer.special_tokens = list(special)
    trainer.show_progress = False
    tokenizer.train_from_iterator(SENTENCES * 20, trainer)
    return tokenizer


def make_gpt2() -> tokenizers.Tokenizer:
    """Make a tokenizer like GPT-2's: bytes, and one special token with the last id."""
    tokenizer = train(
        models.BPE(),
        trainers.BpeTrainer(vocab_size=330, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()),
        [],
        pre_tokenizer=pre_tokenizers.ByteLevel(add_prefix_space=False),
        decoder=decoders.ByteLevel(),
        post_processor=processors.ByteLevel(trim_offsets=False),
    )
    tokenizer.add_special_tokens(["<|endoftext|>"])
    return tokenizer


def make_bert() -> tokenizers.Tokenizer:
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    return train(
        models.WordPiece(unk_token="[UNK]"),
        trainers.WordPieceTrainer(vocab_size=160),
        special,
        normalizer=normalizers.BertNormalizer(),
        pre_tokenizer=pre_tokenizers.BertPreTokenizer(),
        decoder=decoders.WordPiece(),
        post_processor=processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2)),
    )


def make_unigram() -> tokenizers.Tokenizer:
    """Make a model whose special tokens are pieces too, so that it could find them in a text."""
    return train(
        models.Unigram(),
        trainers.UnigramTrainer(vocab_size=120, unk_token="<unk>"),
        ["<pad>", "</s>", "<unk>", "<s>"],
        normalizer=normalizers.NFKC(),
        pre_tokenizer=pre_tokenizers.Metaspace(),
        decoder=decoders.Metaspace(),
        post_processor=processors.TemplateProcessing(
            single="<s> $A </s>", special_tokens=[("<s>", 3), ("</s>", 1)]
        ),
    )


def make_words() -> tokenizers.Tokenizer:
    return train(
        models.WordLevel(unk_token="<unk>"),
        trainers.WordLevelTrainer(),
        ["<unk>", "</s>", "<mask>"],
        pre_tokenizer=pre_tokenizers.WhitespaceSplit(),
    )


def make_llama3() -> tokenizers.Tokenizer:
    """Make a tokenizer like Llama 3's: split by a pattern, with added tokens after the model's."""
    pattern = next(pattern for pattern in _PATTERNS if "{1,3}" in pattern and "Lu" not in pattern)
    tokenizer = train(
        models.BPE(ignore_merges=True),
        trainers.BpeTrainer(vocab_size=330, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()),
        [],
        pre_tokenizer=pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        ),
        decoder=decoders.ByteLevel(),
    )
    tokenizer.add_special_tokens(["<|begin_of_text|>", "<|end_of_text|>", "<|mask|>"])
    tokenizer.add_tokens(["    ", "<tool>"])
    tokenizer.add_special_tokens(["<|reserved|>"])
    return tokenizer


MAKERS: dict[str, Callable[[], tokenizers.Tokenizer]] = {
    "gpt2": make_gpt2,
    "bert": make_bert,
    "unigram": make_unigram,
    "words": make_words,
    "llama3": make_llama3,
}


def load_changed(
    content: bytes, change: Callable[[dict[str, Any]], object], **files: Any
) -> Tokenizer:
    fields = json.loads(content)
    change(fields)
    named = {f"{name}.json": json.dumps(value).encode() for name, value in files.items()}
    return Tokenizer({"tokenizer.json": json.dumps(fields).encode(), **named})
