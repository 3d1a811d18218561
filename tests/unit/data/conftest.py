"""Small datasets and a small tokenizer, made for each run of the tests."""

import dataclasses
import itertools
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from data_tools.text.embedded_corpus import collect_documents
from data_tools.tokenizer_training import TokenizerOptions, train_tokenizer
from megatron_eso.data.shards.manifest import Source
from megatron_eso.data.shards.writer import DatasetWriter
from megatron_eso.data.tokenizers.fingerprint import TokenizerFingerprint

EOS = 2

Tokens = npt.NDArray[np.int64]
MakeDataset = Callable[..., Tokens]


@pytest.fixture(scope="session")
def make_dataset() -> MakeDataset:
    """Return a function that writes a dataset of random tokens and returns the tokens."""

    def make(
        directory: Path,
        num_tokens: int,
        record_tokens: int,
        shard_records: int = 3,
        vocab_size: int = 50_000,
        **tokenizer: Any,
    ) -> Tokens:
        # Random tokens with an end-of-text token at every 101st place and at the end.
        tokens = np.random.default_rng(num_tokens).integers(5, vocab_size, num_tokens)
        tokens[::101] = EOS
        tokens[-1] = EOS
        fingerprint = TokenizerFingerprint(
            kind="sentencepiece",
            model_sha256="0" * 64,
            pieces_sha256="1" * 64,
            vocab_size=vocab_size,
            mask_token_id=4,
            eos_token_id=EOS,
            bos_token_id=None,
            pad_token_id=3,
            unk_token_id=0,
        )
        fingerprint = dataclasses.replace(fingerprint, **tokenizer)
        directory.mkdir()
        writer = DatasetWriter(
            directory,
            tokenizer=fingerprint,
            tokenizer_files={"tokenizer.model": b"model"},
            record_tokens=record_tokens,
            shard_records=shard_records,
        )
        # Append parts that do not align with records.
        for part in np.array_split(tokens, 7):
            writer.append(part)
        source = Source(path="a.jsonl", bytes=1, sha256="2" * 64, num_documents=1)
        writer.finish(sources=[source], num_text_bytes=num_tokens)
        return tokens

    return make


@pytest.fixture(scope="session")
def tokenizer_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train a tokenizer of 600 pieces."""
    folder = tmp_path_factory.mktemp("tokenizer")
    text = folder / "text.txt"
    library = Path(sysconfig.get_path("stdlib"))
    documents = itertools.islice(collect_documents(library), 70)
    text.write_text("\n".join(documents), encoding="utf-8")
    options = TokenizerOptions(inputs=[str(text)], vocab_size=600, out=folder / "tokenizer")
    train_tokenizer(options)
    return folder / "tokenizer"
