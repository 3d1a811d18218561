"""Deduplication and shuffling, compared with a dictionary and the documents themselves."""

import json
import random
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from data_tools.builds.dataset import BuildOptions, build_dataset
from data_tools.builds.deduplication import CountedSpan, mark_duplicates, read_marks
from data_tools.builds.journal import SpanFiles
from data_tools.builds.unit_encoder import DOCUMENT_DTYPE
from megatron_eso.data.shards.reader import TokenDataset
from megatron_eso.data.tokenizers.tokenizer import Tokenizer

STANDARD_DEVIATIONS = 5  # for random results


@pytest.fixture(scope="module")
def texts() -> list[str]:
    """Make short documents, of which a third are repeated, some often."""
    draw = random.Random(1)
    distinct = [f"document {number} " * draw.randint(1, 30) for number in range(2000)]
    return draw.choices(distinct, k=500) + distinct + draw.choices(distinct[:50], k=500)


@pytest.fixture(scope="module")
def inputs(texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Write the documents to three files of different sizes."""
    folder = tmp_path_factory.mktemp("texts")
    lines = [json.dumps({"text": text}) + "\n" for text in texts]
    for name, part in (("a", lines[:100]), ("b", lines[100:900]), ("c", lines[900:])):
        (folder / f"{name}.jsonl").write_text("".join(part))
    return [str(folder)]


def build(inputs: list[str], tokenizer: Path, out: Path, **settings: object) -> dict[str, str]:
    options = BuildOptions(
        inputs=inputs,
        tokenizer=str(tokenizer),
        out=out,
        **{"record_tokens": 2**12, "shard_records": 8, "span_bytes": 2**16} | settings,
    )
    return build_dataset(options)


def read_documents(directory: Path) -> list[str]:
    dataset = TokenDataset.open(directory)
    tokenizer = Tokenizer.load(dataset.tokenizer_directory)
    tokens = dataset.rows(np.arange(dataset.num_rows(1)), 1)[:, 0]
    ends = np.flatnonzero(tokens == tokenizer.eos_token_id) + 1
    return [tokenizer.decode(part.tolist()) for part in np.split(tokens, ends)[:-1]]


def test_the_first_of_equal_documents_is_kept(
    texts: list[str], inputs: list[str], tokenizer_directory: Path, tmp_path: Path
) -> None:
    build(inputs, tokenizer_directory, tmp_path / "all", deduplicate=True)
    expected = list(dict.fromkeys(texts))
    assert read_documents(tmp_path / "all") == expected
    manifest = TokenDataset.open(tmp_path / "all").manifest
    assert manifest.num_documents == len(expected)
    assert manifest.num_duplicates == len(texts) - len(expected)
    assert manifest.num_text_bytes == sum(map(len, expected))
    by_file = [0, 0, 0]
    seen: set[str] = set()
    for number, text in enumerate(texts):
        by_file[(number >= 100) + (number >= 900)] += text not in seen
        seen.add(text)
    found = {name: 0 for name in ("a.jsonl", "b.jsonl", "c.jsonl")}
    for source in manifest.sources:
        found[source.path] += source.num_documents
    assert list(found.values()) == by_file


def test_a_shuffled_dataset_has_each_document_once(
    texts: list[str], inputs: list[str], tokenizer_directory: Path, tmp_path: Path
) -> None:
    ids = [
        build(inputs, tokenizer_directory, tmp_path / str(number), shuffle_seed=seed, **settings)
        for number, (seed, settings) in enumerate(
            [(1, {}), (1, {"num_workers": 2}), (2, {}), (1, {"span_bytes": 2**30})]
        )
    ]
    first, same, other, unsplit = (read_documents(tmp_path / str(number)) for number in range(4))
    assert ids[0] == ids[1]
    assert first == same
    assert first == unsplit  # the spans of the input do not change the order
    assert sorted(first) == sorted(other) == sorted(texts)
    assert first != other
    # The index of a single document in a random order has the mean (n - 1) / 2.
    single = [text for text, count in Counter(texts).items() if count == 1]
    size, places = len(texts), {text: number for number, text in enumerate(first)}
    half = [places[text] for text in single[: len(single) // 2]]
    deviation = size / np.sqrt(12 * len(half))
    assert abs(np.mean(half) - (size - 1) / 2) < STANDARD_DEVIATIONS * deviation
    manifest = TokenDataset.open(tmp_path / "0").manifest
    assert manifest.shuffle_seed == 1
    assert manifest.num_duplicates is None


def test_all_selections_together(
    texts: list[str], inputs: list[str], tokenizer_directory: Path, tmp_path: Path
) -> None:
    settings = {"deduplicate": True, "validation_share": 0.2}
    build(inputs, tokenizer_directory, tmp_path / "straight", **settings)
    build(inputs, tokenizer_directory, tmp_path / "shuffled", shuffle_seed=7, **settings)
    duplicates = 0
    together: list[str] = []
    for split in ("train", "validation"):
        straight, shuffled = (
            read_documents(tmp_path / name / split) for name in ("straight", "shuffled")
        )
        assert straight != shuffled
        assert sorted(straight) == sorted(shuffled)
        together += straight
        duplicates += TokenDataset.open(tmp_path / "shuffled" / split).manifest.num_duplicates or 0
    assert sorted(together) == sorted(set(texts))
    assert duplicates == len(texts) - len(together)


def test_buckets_do_not_change_the_duplicates(tmp_path: Path) -> None:
    """The hashes have few values, which are equal in their low half, their high half or both."""
    draw = np.random.default_rng(1)
    spans, keys = [], []
    for number, count in enumerate((1000, 0, 70_000, 3)):
        documents = np.zeros(count, dtype=DOCUMENT_DTYPE)
        documents["hash_low"] = draw.integers(0, 200, count)
        documents["hash_high"] = draw.integers(0, 200, count) << 40
        files = SpanFiles(directory=tmp_path, number=number)
        files.documents.write_bytes(documents.tobytes())
        spans.append(CountedSpan(files=files, num_documents=count))
        keys += list(
            zip(documents["hash_low"].tolist(), documents["hash_high"].tolist(), strict=True)
        )
    last_first = reversed(list(enumerate(keys)))
    firsts = set({key: number for number, key in last_first}.values())
    expected = [number not in firsts for number in range(len(keys))]
    for bucket_documents, workers in ((2**24, 1), (5000, 1), (20_000, 2)):
        path = tmp_path / f"marks_{bucket_documents}"
        mark_duplicates(spans, path, workers, bucket_documents)
        found = np.concatenate(read_marks(path, spans)).tolist()
        assert found == expected
