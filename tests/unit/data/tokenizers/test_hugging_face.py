"""`tokenizer.json`: the library's own ids for plain text, and no special token out of any text."""

import copy
import json
import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer

from megatron_eso.data.tokenizers.hugging_face_cuts import _PATTERNS
from megatron_eso.data.tokenizers.tokenizer import Tokenizer
from megatron_eso.errors import DataError

ROOT = Path(__file__).parents[4]
SENTENCES = [
    "The quick brown fox doesn't jump over 12 lazy dogs.",
    "  def f(x):\n\treturn x + 1  # twice\n\n",
    "Zo\u00eb sah 3 B\u00e4ren; \u00c9COLE, \u6f22\u5b57 \U0001f600!",
]
TEXT = " ".join(SENTENCES)
SPECIAL = ["<s>", "</s>", "<pad>", "<unk>", "<mask>", "[CLS]", "[MASK]", "<|endoftext|>"]
PREFIX = b'"continuing_subword_prefix":"x"'
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
    """Like GPT-2's: bytes, one special token, the last of the vocabulary."""
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
    """Split by a pattern; special and other added tokens behind the model's."""
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


def special_ids(tokenizer: Tokenizer) -> set[int]:
    found = {tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.pad_token_id}
    return {token for token in {*found, tokenizer.mask_token_id} if token is not None}


def load_changed(
    content: bytes, change: Callable[[dict[str, Any]], object], **files: Any
) -> Tokenizer:
    fields = json.loads(content)
    change(fields)
    named = {f"{name}.json": json.dumps(value).encode() for name, value in files.items()}
    return Tokenizer({"tokenizer.json": json.dumps(fields).encode(), **named})


@settings(max_examples=60, deadline=None)
@given(text=ANY_TEXT)
def test_ids_are_the_librarys(
    loaded: Tokenizer, library: tokenizers.Tokenizer, name: str, text: str
) -> None:
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


def test_the_models_would_have_given_them(contents: dict[str, bytes]) -> None:
    """Show the fault in the library itself, even with its option against it."""
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
    """50257 ids, no mask: 50258 ids, the mask is 50257."""
    fields = json.loads(contents["gpt2"])
    size = len(fields["model"]["vocab"])
    more = {f"word{number}": number for number in range(size, 50256)}
    fields["model"]["vocab"] |= more
    fields["added_tokens"][0]["id"] = 50256
    config = {"eos_token": {"content": "<|endoftext|>"}, "bos_token": "<|endoftext|>"}
    for beside in ({}, {"special_tokens_map": config}):
        tokenizer = load_changed(json.dumps(fields).encode(), lambda _: None, **beside)
        assert tokenizer.vocab_size == 50258
        assert tokenizer.mask_token_id == 50257
        assert tokenizer.eos_token_id == 50256
        assert tokenizer.bos_token_id == (50256 if beside else None)
        assert tokenizer.pad_token_id is None


def test_names_beside_the_file_go_before_the_usual_ones(contents: dict[str, bytes]) -> None:
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


def test_the_fingerprint_tells_apart_what_gives_other_ids(contents: dict[str, bytes]) -> None:
    content = contents["gpt2"]
    plain = Tokenizer({"tokenizer.json": content})
    assert plain.fingerprint().kind == "hugging_face"
    spaced = json.dumps(json.loads(content), indent=3).encode()
    pairs = json.loads(content)
    pairs["model"]["merges"] = [" ".join(pair) for pair in pairs["model"]["merges"]]
    for same in (spaced, json.dumps(pairs).encode()):
        assert Tokenizer({"tokenizer.json": same}).fingerprint().identity == (
            plain.fingerprint().identity
        )
    changes: list[Callable[[dict[str, Any]], object]] = [
        lambda fields: fields["model"]["merges"].reverse(),
        lambda fields: fields["model"].update(ignore_merges=True),
        lambda fields: fields["pre_tokenizer"].update(add_prefix_space=True),
        lambda fields: fields.update(normalizer={"type": "Lowercase"}),
        lambda fields: fields["added_tokens"][0].update(special=False),
    ]
    identities = [load_changed(content, change).fingerprint().identity for change in changes]
    identities.append(plain.fingerprint().identity)
    unigram = contents["unigram"]
    identities.append(Tokenizer({"tokenizer.json": unigram}).fingerprint().identity)
    scores = load_changed(unigram, _lower_a_score)
    identities.append(scores.fingerprint().identity)
    encoded = [json.dumps(identity, sort_keys=True) for identity in identities]
    assert len(set(encoded)) == len(encoded)


def _lower_a_score(fields: dict[str, Any]) -> None:
    fields["model"]["vocab"][9][1] -= 0.5


def test_a_saved_tokenizer_is_the_same(loaded: Tokenizer, name: str, tmp_path: Path) -> None:
    loaded.save(tmp_path)
    for copied in (
        Tokenizer.load(tmp_path),
        Tokenizer.load(tmp_path / "tokenizer.json"),
        pickle.loads(pickle.dumps(loaded)),
        copy.deepcopy(loaded),
    ):
        assert copied.fingerprint() == loaded.fingerprint()
        assert copied.files() == loaded.files()
        assert copied.encode(TEXT) == loaded.encode(TEXT)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert config["mask_token"] == loaded.piece(loaded.mask_token_id)


def test_transformers_opens_what_is_saved(loaded: Tokenizer, tmp_path: Path) -> None:
    loaded.save(tmp_path)
    other = AutoTokenizer.from_pretrained(str(tmp_path))
    assert len(other) == loaded.vocab_size
    assert other.mask_token_id == loaded.mask_token_id
    assert other.eos_token_id == loaded.eos_token_id
    assert other.bos_token_id == loaded.bos_token_id
    assert other.pad_token_id == loaded.pad_token_id
    assert other(TEXT, add_special_tokens=False)["input_ids"] == loaded.encode(TEXT)


def test_damaged_and_foreign_files_are_one_line(contents: dict[str, bytes], tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    content = contents["unigram"]
    fields = json.loads(content)

    def changed(**values: Any) -> bytes:
        return json.dumps({**fields, **values}).encode()

    model = fields["model"]
    cases = [content[: len(content) * part // 23] for part in range(1, 23)]
    cases += [b"{}", b'{"model": 3}', b"{" * 100_000, changed(model={**model, "vocab": []})]
    cases += [changed(model={**model, "type": "Pickle"}), changed(added_tokens=None)]
    cases += [changed(model={**model, "unk_id": 10**9}), changed(normalizer={"type": "Exec"})]
    shifted = [{**token, "id": token["id"] + 10**10} for token in fields["added_tokens"]]
    cases += [changed(added_tokens=shifted), changed(model={**model, "vocab": [["a"]]})]
    misplaced = [{**token, "id": token["id"] + 500} for token in fields["added_tokens"]]
    cases += [changed(added_tokens=misplaced)]
    # The library cuts prefixes off merges unseen, and aborts the process where one is not there.
    cases += [contents["gpt2"].replace(b'"continuing_subword_prefix":null', PREFIX)]
    for case in cases:
        path.write_bytes(case)
        with pytest.raises(DataError, match=r"tokenizer\.json: .*; copy it again or give another$"):
            Tokenizer.load(tmp_path)
    path.write_bytes(content)
    (tmp_path / "tokenizer_config.json").write_text("[]")
    with pytest.raises(DataError, match="tokenizer_config.json is no JSON object"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer_config.json").unlink()
    (tmp_path / "tokenizer.model").write_bytes(b"model")
    with pytest.raises(DataError, match=r"holds both tokenizer\.model and tokenizer\.json"):
        Tokenizer.load(tmp_path)
    Tokenizer.load(path)


def test_threads_of_the_library_do_not_matter(contents: dict[str, bytes], tmp_path: Path) -> None:
    """The variable may say what it wants: one thread, equal ids."""
    Tokenizer({"tokenizer.json": contents["gpt2"]}).save(tmp_path)
    program = (
        "import hashlib, os, sys\n"
        "from megatron_eso.data.tokenizers.tokenizer import Tokenizer\n"
        "tokenizer = Tokenizer.load(sys.argv[1])\n"
        "ids = tokenizer.encode_batch([b'some words and 12 numbers'] * 5000)\n"
        "threads = len(os.listdir('/proc/self/task'))\n"
        "print(hashlib.sha256(b''.join(part.tobytes() for part in ids)).hexdigest(), threads)\n"
    )
    outputs = [
        subprocess.run(
            [sys.executable, "-c", program, str(tmp_path)],
            env={**os.environ, "TOKENIZERS_PARALLELISM": value, "OMP_NUM_THREADS": "1"},
            **{"check": True, "capture_output": True, "text": True, "cwd": ROOT},
        ).stdout
        for value in ("true", "false")
    ]
    assert outputs[0] == outputs[1]
    assert outputs[0].split()[1] == "1"
