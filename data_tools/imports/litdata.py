"""Reads chunks of tokens that litdata wrote for its TokensLoader.

`index.json` names the chunks and the dtype. A chunk is the number of its items (uint32), their
offsets in the file (uint32, one more), and their bytes. Each item is a tensor of one dimension
without a header, here a document. Source: litdata/streaming/{writer,serializers,item_loader}.py.
"""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt

from data_tools.imports.interface import TokenBlock, TokenFormat, TokenSource, read_blocks

INDEX_FILE = "index.json"
_FORMAT = "no_header_tensor:"
_DTYPES = {
    "11": "<u1",
    "12": "<i1",
    **dict.fromkeys(("13", "14"), "<i2"),
    **dict.fromkeys(("15", "16"), "<i4"),
    **dict.fromkeys(("17", "18"), "<i8"),
    "20": "<u2",
}


class LitdataFiles:
    """Folders of litdata's chunks.

    Args:
        inputs: Folders with an `index.json`.

    Raises:
        ConfigError: A file is missing.
        DataError: The index or a chunk is damaged or of another kind.
    """

    def __init__(self, inputs: list[str]) -> None:
        self._folders = [_Folder(Path(text)) for text in inputs]

    @property
    def sources(self) -> list[TokenSource]:
        """The files, each index before its chunks."""
        return [source for folder in self._folders for source in (folder.index, *folder.chunks)]

    def read_blocks(self) -> Iterator[TokenBlock]:
        """Yield all tokens; see `TokenFiles.read_blocks`."""
        for folder in self._folders:
            with folder.index.opened():
                folder.index.read(folder.index.num_bytes)
            for chunk in folder.chunks:
                with chunk.opened():
                    ends = folder.read_ends(chunk)
                    num_tokens = int(ends[-1]) if len(ends) else 0
                    yield from read_blocks(
                        chunk, folder.dtype, num_tokens, np.unique(ends[ends > 0])
                    )


class _Folder:
    """A folder whose index was read."""

    def __init__(self, path: Path) -> None:
        self.index = TokenSource(path / INDEX_FILE, f"{path.name}/{INDEX_FILE}")
        try:
            fields = json.loads(self.index.path.read_bytes())
            config, names = fields["config"], [chunk["filename"] for chunk in fields["chunks"]]
            (kind,) = config["data_format"]
            compression = config["compression"]
            is_plain = all(isinstance(name, str) and Path(name).name == name for name in names)
        except (ValueError, KeyError, TypeError) as error:
            self.index.fail(f"is not an index of litdata ({error!r})")
        code = str(kind).removeprefix(_FORMAT)
        if compression or config.get("encryption") or code not in _DTYPES or not is_plain:
            self.index.fail(
                f"data_format {kind!r}, compression {compression!r}: only plain chunks of integer "
                f"tensors of one dimension ({_FORMAT}CODE) can be read"
            )
        self.dtype: np.dtype[np.integer] = np.dtype(_DTYPES[code])
        self.chunks = [TokenSource(path / name, f"{path.name}/{name}") for name in names]

    def read_ends(self, chunk: TokenSource) -> npt.NDArray[np.int64]:
        """Read the header of an open chunk; return the tokens up to each item's end, int64."""
        num_items = int(np.frombuffer(chunk.read(4), dtype="<u4")[0])
        header_bytes = 4 * (num_items + 2)
        if header_bytes > chunk.num_bytes:
            chunk.fail(f"the file is too short for the offsets of {num_items} items")
        offsets = np.frombuffer(chunk.read(4 * (num_items + 1)), dtype="<u4").astype(np.int64)
        sizes = np.diff(offsets)
        if (
            offsets[0] != header_bytes
            or offsets[-1] != chunk.num_bytes
            or (sizes < 0).any()
            or (sizes % self.dtype.itemsize).any()
        ):
            chunk.fail(
                f"the offsets of {num_items} items do not fit the file of {chunk.num_bytes} bytes"
            )
        ends: npt.NDArray[np.int64] = (offsets[1:] - header_bytes) // self.dtype.itemsize
        return ends


LITDATA = TokenFormat(
    option="packed",
    label="litdata's folders",
    help="folders of litdata's chunks",
    recognizes=lambda text: (Path(text) / INDEX_FILE).is_file(),
    open=lambda inputs, tokenizer: LitdataFiles(inputs),
)
