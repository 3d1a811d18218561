"""Small datasets of drawn words, made by the real tools."""

import random
from pathlib import Path

from data_tools.builds.dataset import BuildOptions, build_dataset
from data_tools.tokenizer_training import TokenizerOptions, train_tokenizer

NUM_WORDS = 200
NUM_DOCUMENTS = 300


def build_tiny_data(folder: Path) -> Path:
    """Build `train` and `validation`; the same bytes every time."""
    draw = random.Random(1)
    words = ["".join(draw.choices("abcdefgh", k=draw.randint(2, 7))) for _ in range(NUM_WORDS)]
    texts = folder / "texts"
    texts.mkdir()
    for number in range(NUM_DOCUMENTS):
        text = " ".join(draw.choices(words, k=draw.randint(20, 120)))
        (texts / f"{number:03d}.txt").write_text(text)
    tokenizer = folder / "tokenizer"
    train_tokenizer(TokenizerOptions(inputs=[str(texts)], vocab_size=400, out=tokenizer))
    build_dataset(
        BuildOptions(
            inputs=[str(texts)],
            tokenizer=str(tokenizer),
            out=folder / "shards",
            validation_share=0.1,
            record_tokens=4096,
            shard_records=4,
        )
    )
    return folder / "shards"
