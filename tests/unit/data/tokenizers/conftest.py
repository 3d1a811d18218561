"""Each family of Hugging Face tokenizers: its file, our tokenizer, the library's."""

import pytest
import tokenizers

from megatron_eso.data.tokenizers.tokenizer import Tokenizer
from tests.support.hugging_face import MAKERS


@pytest.fixture(scope="module")
def contents() -> dict[str, bytes]:
    return {name: make().to_str().encode() for name, make in MAKERS.items()}


@pytest.fixture(scope="module", params=MAKERS)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def loaded(contents: dict[str, bytes], name: str) -> Tokenizer:
    return Tokenizer({"tokenizer.json": contents[name]})


@pytest.fixture(scope="module")
def library(contents: dict[str, bytes], name: str) -> tokenizers.Tokenizer:
    return tokenizers.Tokenizer.from_str(contents[name].decode())
