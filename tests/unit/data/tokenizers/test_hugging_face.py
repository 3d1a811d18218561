"""`tokenizer.json`: the library's own ids for plain text, and no special token out of any text."""

import json
from typing import Any

import numpy as np
import pytest
import tokenizers
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from megatron_eso.data.tokenizers.tokenizer import Tokenizer
from megatron_eso.errors import DataError
from tests.support.hugging_face import ANY_TEXT, TEXT, load_changed

SPECIAL = ["<s>", "</s>", "<pad>", "<unk>", "<mask>", "[CLS]", "[MASK]", "<|endoftext|>"]


def special_ids(tokenizer: Tokenizer) -> set[int]:
    found = {tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.pad_token_id}
    return {token for token in {*found, tokenizer.mask_token_id} if token is not None}


@settings(max_examples=60, deadline=None)
@given(text=ANY_TEXT)
def test_ids_are_the_librarys(
    loaded: Tokenizer, library: tokenizers.Tokenizer, name: str, text: str
) -> None:
    # Hypothesis also tries strings from the source code, such as the name of a special token.
    added = library.get_added_tokens_decoder().values()
    assume(not any(token.content in text for token in added if token.special))
    ids = loaded.encode(text)
    assert ids == library.encode(text, add_special_tokens=False).ids
    if name in ("gpt2", "llama3"):
        assert loaded.decode(ids) == text


@settings(max_examples=60, deadline=None)
@given(parts=st.lists(st.one_of(st.sampled_from([*SPECIAL, " ", "a"]), ANY_TEXT), max_size=8))
def test_no_text_gives_a_special_token(loaded: Tokenizer, name: str, parts: list[str]) -> None:
    text = "".join(parts)
    ids = loaded.encode(text)
    assert not special_ids(loaded) & set(ids)
    if name in ("gpt2", "llama3"):
        assert loaded.decode(ids) == text


def test_the_library_gives_special_tokens_for_text(contents: dict[str, bytes]) -> None:
    """Show that the library gives special tokens for text, even with its option against it."""
    for name, text in (("unigram", "a</s>"), ("words", "fox </s>")):
        library = tokenizers.Tokenizer.from_str(contents[name].decode())
        library.encode_special_tokens = True
        assert "</s>" in library.encode(text, add_special_tokens=False).tokens


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("gpt2", ("<|endoftext|>", None, None, None)),
        ("bert", ("[SEP]", "[CLS]", "[PAD]", "[UNK]")),
        ("unigram", ("</s>", "<s>", "<pad>", "<unk>")),
        ("words", ("</s>", None, None, "<unk>")),
        ("llama3", ("<|end_of_text|>", "<|begin_of_text|>", None, None)),
    ],
)
def test_special_tokens_are_found_by_their_usual_names(
    contents: dict[str, bytes], name: str, expected: tuple[str | None, ...]
) -> None:
    tokenizer = Tokenizer({"tokenizer.json": contents[name]})
    vocabulary = tokenizers.Tokenizer.from_str(contents[name].decode()).get_vocab()
    ids = (
        tokenizer.eos_token_id,
        tokenizer.bos_token_id,
        tokenizer.pad_token_id,
        tokenizer.unk_token_id,
    )
    assert ids == tuple(None if piece is None else vocabulary[piece] for piece in expected)
    mask = {"bert": "[MASK]", "words": "<mask>", "llama3": "<|mask|>"}.get(name)
    size = len(vocabulary)
    assert tokenizer.mask_token_id == (size if mask is None else vocabulary[mask])
    assert tokenizer.vocab_size == (size + 1 if mask is None else size)
    assert tokenizer.mask_token_id not in ids
    for piece, token in vocabulary.items():
        assert tokenizer.piece(token) == piece
    assert tokenizer.piece(tokenizer.mask_token_id) == (mask or "<mask>")


def test_the_vocabulary_of_gpt2_is_the_references(contents: dict[str, bytes]) -> None:
    """Add a mask token to GPT-2's 50257 ids: it has the id 50257, and there are 50258 ids."""
    fields = json.loads(contents["gpt2"])
    size = len(fields["model"]["vocab"])
    more = {f"word{number}": number for number in range(size, 50256)}
    fields["model"]["vocab"] |= more
    fields["added_tokens"][0]["id"] = 50256
    config = {"eos_token": {"content": "<|endoftext|>"}, "bos_token": "<|endoftext|>"}
    for others in ({}, {"special_tokens_map": config}):
        tokenizer = load_changed(json.dumps(fields).encode(), lambda _: None, **others)
        assert tokenizer.vocab_size == 50258
        assert tokenizer.mask_token_id == 50257
        assert tokenizer.eos_token_id == 50256
        assert tokenizer.bos_token_id == (50256 if others else None)
        assert tokenizer.pad_token_id is None


def test_names_in_other_files_come_before_the_usual_names(contents: dict[str, bytes]) -> None:
    content = contents["unigram"]
    tokenizer = load_changed(
        content,
        lambda _: None,
        tokenizer_config={"eos_token": "<s>", "mask_token": "<pad>", "pad_token": "<pad>"},
        special_tokens_map={"eos_token": "</s>", "bos_token": {"content": "</s>"}},
    )
    assert (tokenizer.piece(tokenizer.eos_token_id or 0)) == "<s>"
    assert (tokenizer.piece(tokenizer.bos_token_id or 0)) == "</s>"
    # The padding cannot be the mask: it is added.
    assert tokenizer.mask_token_id == tokenizer.vocab_size - 1 != tokenizer.pad_token_id
    named = load_changed(content, lambda _: None, tokenizer_config={"mask_token": "<M>"})
    assert named.piece(named.vocab_size - 1) == "<M>"
    assert named.mask_token_id == named.vocab_size - 1
    with pytest.raises(ValueError, match="eos_token is '<nowhere>'"):
        load_changed(content, lambda _: None, tokenizer_config={"eos_token": "<nowhere>"})


def test_what_is_added_or_random_in_encoding_is_left_out(contents: dict[str, bytes]) -> None:
    plain = Tokenizer({"tokenizer.json": contents["gpt2"]})

    def change(fields: dict[str, Any]) -> None:
        fields["model"]["dropout"] = 0.9
        fields["truncation"] = {
            **{"direction": "Right", "max_length": 3, "strategy": "LongestFirst"},
            "stride": 0,
        }
        fields["padding"] = {
            **{"strategy": {"Fixed": 99}, "direction": "Right", "pad_to_multiple_of": None},
            **{"pad_id": 7, "pad_type_id": 0, "pad_token": "!"},
        }

    noisy = load_changed(contents["gpt2"], change)
    assert noisy.encode(TEXT) == plain.encode(TEXT)
    assert noisy.fingerprint().identity == plain.fingerprint().identity


def test_an_unknown_character_never_becomes_a_special_token(contents: dict[str, bytes]) -> None:
    tokenizer = load_changed(
        contents["words"],
        lambda fields: fields["model"].update(unk_token="</s>"),
    )
    with pytest.raises(DataError, match="unk_token of its own"):
        tokenizer.encode("fox xylophone")
    assert len(tokenizer.encode("quick brown")) == 2


@settings(max_examples=100, deadline=None)
@given(texts=st.lists(ANY_TEXT, max_size=6))
def test_a_batch_gives_what_each_text_gives(loaded: Tokenizer, texts: list[str]) -> None:
    batch = loaded.encode_batch([text.encode() for text in texts])
    assert [ids.tolist() for ids in batch] == [loaded.encode(text) for text in texts]
    assert all(ids.dtype == np.int32 for ids in batch)
