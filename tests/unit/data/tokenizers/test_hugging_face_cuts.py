"""Long texts are encoded in parts only where that changes no id."""

from collections.abc import Callable
from typing import Any

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import pre_tokenizers

from megatron_eso.data.tokenizers.hugging_face_cuts import _PATTERNS
from megatron_eso.data.tokenizers.tokenizer import Tokenizer
from tests.support.hugging_face import ANY_TEXT, TEXT, load_changed


@pytest.mark.parametrize(
    "cut", [b"! ", b"x  ", b". a", b"a\xcc\x81 .", b"\xe3\x80\x80 a", b"'s 's", b"9 9"]
)
def test_long_texts_are_cut_without_a_change(
    loaded: Tokenizer, library: tokenizers.Tokenizer, cut: bytes
) -> None:
    text = (TEXT.encode() + cut) * 800
    assert len(text) > 6 * 16 * 1024
    expected = library.encode(text.decode(), add_special_tokens=False).ids
    assert loaded.encode_utf8(text).tolist() == expected
    assert len(list(loaded._split(text))) > 3


@settings(max_examples=150, deadline=None)
@given(left=ANY_TEXT, visible=st.sampled_from(".,'a1)T"), right=ANY_TEXT)
@pytest.mark.parametrize("pattern", sorted(_PATTERNS))
def test_patterns_split_before_a_space_after_a_visible_character(
    pattern: str, left: str, visible: str, right: str
) -> None:
    split = pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated")

    def cut(text: str) -> list[str]:
        return [piece for piece, _ in split.pre_tokenize_str(text)]

    left, right = left + visible, " " + right
    assert cut(left + right) == cut(left) + cut(right)


def test_a_text_that_may_not_be_cut_is_encoded_whole(contents: dict[str, bytes]) -> None:
    def whole(change: Callable[[dict[str, Any]], object], name: str = "gpt2") -> bool:
        return not load_changed(contents[name], change)._model.splits_before_spaces

    assert not whole(lambda _: None)
    added = {"content": "a b", "id": 331, "special": False, "normalized": False}
    added |= {"lstrip": False, "rstrip": False, "single_word": False}
    assert whole(lambda fields: fields["added_tokens"].append(added))
    stripping = {**added, "content": "ab", "rstrip": True}
    assert whole(lambda fields: fields["added_tokens"].append(stripping))
    assert whole(lambda fields: fields.update(pre_tokenizer=None))
    assert whole(lambda fields: fields["pre_tokenizer"].update(use_regex=False))
    prepend = {"type": "Prepend", "prepend": "_"}
    assert whole(lambda fields: fields.update(normalizer=prepend))
    assert whole(lambda fields: fields["pre_tokenizer"].update(split=False), "unigram")
    pattern = {"Regex": "foo bar"}
    assert whole(
        lambda fields: fields["pre_tokenizer"]["pretokenizers"][0].update(pattern=pattern), "llama3"
    )
