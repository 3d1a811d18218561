"""Tokenizers: decoding gives the text again, and only the mask token has its id."""

import io
import pickle
from pathlib import Path

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_eso.data.tokenizers.tokenizer import Tokenizer, split_segments
from megatron_eso.errors import DataError

LOSSLESS = [
    "",
    " ",
    "\n",
    " leading and trailing ",
    "a  b\n\n  def f():\n\treturn 1\n",
    "\r\n\x00\x0b\x1f\x7f\x85\u2028\ufeff",
    "\u00e9\u6f22\U0001f600 a\u0301 \ufb01",
    "<mask></s><unk><0x41><pad>",
]

# The official default settings normalize, add a space and drop newlines; there is no mask token.
SENTENCES = ["the quick brown fox jumps over the lazy dog", "pack my box with five dozen jugs"] * 20


@pytest.fixture(scope="module")
def tokenizer(tokenizer_directory: Path) -> Tokenizer:
    return Tokenizer.load(tokenizer_directory)


def train_foreign(**settings: object) -> bytes:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES),
        model_writer=model,
        vocab_size=50,
        hard_vocab_limit=False,
        minloglevel=2,
        **settings,
    )
    return model.getvalue()


@pytest.mark.parametrize("text", LOSSLESS)
def test_text_comes_back(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text


@settings(max_examples=200, deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\u2581")))
def test_any_text_comes_back(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_the_word_boundary_character_comes_back_as_a_space(tokenizer: Tokenizer) -> None:
    """Decode the one character that changes; the tools count and report it."""
    assert tokenizer.decode(tokenizer.encode("a\u2581b")) == "a b"


def test_special_tokens_are_distinct_and_never_come_out_of_text(tokenizer: Tokenizer) -> None:
    special = [
        tokenizer.unk_token_id,
        tokenizer.bos_token_id,
        tokenizer.eos_token_id,
        tokenizer.pad_token_id,
        tokenizer.mask_token_id,
    ]
    assert special == [0, 1, 2, 3, 4]
    assert tokenizer.piece(tokenizer.mask_token_id) == "<mask>"
    assert not set(special) & set(tokenizer.encode("".join(LOSSLESS)))
    assert tokenizer.decode([2, *tokenizer.encode("a b"), 4, 1, 3]) == "a b"
    assert tokenizer.vocab_size == 600
    for token in (-1, 600):
        with pytest.raises(ValueError, match="must be in"):
            tokenizer.decode([token])


def test_long_text_is_cut_at_newlines_without_a_change(tokenizer: Tokenizer) -> None:
    assert tokenizer.splits_at_newlines
    lines = ["some words and\tnumbers 123 \n", "\n", "   more of them\n"] * 2000
    text = "".join(lines)
    segments = list(split_segments(text.encode()))
    assert len(segments) > 3
    assert b"".join(segments) == text.encode()
    assert all(segment.endswith(b"\n") for segment in segments)
    assert tokenizer.encode(text) == [token for line in lines for token in tokenizer.encode(line)]
    assert tokenizer.decode(tokenizer.encode(text)) == text


@settings(max_examples=100, deadline=None)
@given(texts=st.lists(st.text("ab \n\t\u00e9,"), max_size=5))
def test_lines_are_encoded_independently(tokenizer: Tokenizer, texts: list[str]) -> None:
    whole = tokenizer.encode("".join(f"{text}\n" for text in texts))
    parts = [token for text in texts for token in tokenizer.encode(f"{text}\n")]
    assert whole == parts


def test_a_model_without_mask_token_gets_one(tmp_path: Path) -> None:
    path = tmp_path / "foreign.model"
    path.write_bytes(train_foreign())
    tokenizer = Tokenizer.load(path)
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(path)).get_piece_size()
    assert tokenizer.mask_token_id == pieces
    assert tokenizer.vocab_size == pieces + 1
    assert tokenizer.piece(pieces) == "<mask>"
    assert tokenizer.pad_token_id is None
    assert not tokenizer.splits_at_newlines
    ids = tokenizer.encode("the quick fox")
    assert tokenizer.decode([*ids, tokenizer.mask_token_id]) == "the quick fox"


def test_a_mask_piece_that_is_the_padding_is_not_taken() -> None:
    model = train_foreign(pad_id=3, pad_piece="<mask>")
    tokenizer = Tokenizer({"tokenizer.model": model})
    assert tokenizer.pad_token_id == 3
    assert tokenizer.mask_token_id == tokenizer.vocab_size - 1 != 3


def test_a_mask_piece_that_text_can_produce_is_not_taken() -> None:
    model = train_foreign(user_defined_symbols=["<mask>"])
    tokenizer = Tokenizer({"tokenizer.model": model})
    assert tokenizer.mask_token_id == tokenizer.vocab_size - 1
    assert tokenizer.mask_token_id not in tokenizer.encode("<mask>")


def test_saved_tokenizer_is_the_same(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path / "copy")
    copy = Tokenizer.load(tmp_path / "copy")
    assert copy.fingerprint() == tokenizer.fingerprint()
    assert copy.files() == tokenizer.files()
    assert pickle.loads(pickle.dumps(tokenizer)).fingerprint() == tokenizer.fingerprint()
    foreign = Tokenizer({"tokenizer.model": train_foreign()})
    assert foreign.fingerprint().pieces_sha256 != tokenizer.fingerprint().pieces_sha256


def test_settings_that_change_ids_change_the_pieces_hash_and_the_rest_does_not() -> None:
    def load(**settings: object) -> Tokenizer:
        return Tokenizer({"tokenizer.model": train_foreign(**settings)})

    plain = load()
    same = load(max_sentence_length=5000)
    assert same.fingerprint().model_sha256 != plain.fingerprint().model_sha256
    assert same.fingerprint().identity == plain.fingerprint().identity
    for changed in (
        {"add_dummy_prefix": False},
        {"remove_extra_whitespaces": False},
        {"normalization_rule_name": "nfkc_cf"},
        {"treat_whitespace_as_suffix": True},
    ):
        other = load(**changed)
        text = " The  \uff34wo a"
        assert other.encode(text) != plain.encode(text)
        assert other.fingerprint().identity != plain.fingerprint().identity


def test_missing_and_damaged_models_are_refused(tokenizer_directory: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot read the tokenizer"):
        Tokenizer.load(tmp_path)
    content = (tokenizer_directory / "tokenizer.model").read_bytes()
    for damaged in (b"", b"no model", content[: len(content) // 2]):
        (tmp_path / "tokenizer.model").write_bytes(damaged)
        with pytest.raises(DataError, match=r"tokenizer\.model: it is (empty|not a SentencePiece)"):
            Tokenizer.load(tmp_path)
