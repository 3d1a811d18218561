"""The table of token formats: the format of an input, and a new format as one entry."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from data_tools.imports import formats
from data_tools.imports.formats import FORMATS, OPTIONS, describe_formats
from data_tools.imports.importer import ImportOptions, import_tokens
from data_tools.imports.interface import TokenBlock, TokenFormat, TokenSource
from megatron_eso.data.shards.reader import TokenDataset
from megatron_eso.data.tokenizers.tokenizer import Tokenizer


class RawFiles:
    """Files of little-endian uint16 without a header; each is one document."""

    def __init__(self, inputs: list[str]) -> None:
        self.sources = [TokenSource(Path(text), Path(text).name) for text in inputs]

    def read_blocks(self) -> Iterator[TokenBlock]:
        for source in self.sources:
            with source.opened():
                tokens = np.frombuffer(source.read(source.num_bytes), dtype="<u2")
                ends = np.array([len(tokens)])
                yield TokenBlock(source=source, offset=0, tokens=tokens, ends=ends)


RAW = TokenFormat(
    option="raw",
    label="raw files",
    help=".raw",
    recognizes=lambda text: True,
    open=lambda inputs, tokenizer: RawFiles(inputs),
)


def test_the_help_names_all_formats() -> None:
    assert OPTIONS == ("megatron", "packed")
    assert describe_formats() == (
        "megatron: .bin and .idx; packed: folders of litdata's chunks, or .bin of TinyLlama"
    )


def test_a_new_format_is_one_entry(
    tmp_path: Path, tokenizer_directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(formats, "FORMATS", (*FORMATS, RAW))
    eos = Tokenizer.load(tokenizer_directory).eos_token_id
    documents = [[10, 11, 12], [13], [14, 15]]
    paths = []
    for number, tokens in enumerate(documents):
        paths.append(tmp_path / f"{number}.raw")
        np.array(tokens, dtype="<u2").tofile(paths[-1])
    import_tokens(
        ImportOptions(
            kind="raw",
            inputs=[str(path) for path in paths],
            tokenizer=str(tokenizer_directory),
            out=tmp_path / "out",
        )
    )
    dataset = TokenDataset.open(tmp_path / "out")
    tokens = dataset.rows(np.arange(dataset.num_rows(1)), 1)[:, 0].tolist()
    assert tokens == [token for document in documents for token in [*document, eos]]
    assert [source.path for source in dataset.manifest.sources] == ["0.raw", "1.raw", "2.raw"]
