"""The conversions copy tokenizers, and take the mask token from them."""

from pathlib import Path

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import AutoTokenizer

from checkpoints_conversion.__main__ import main
from megatron_eso.errors import CheckpointError, DataError
from megatron_eso.sampler.network.directory import read_description

WORDS = ["<unk>", "</s>", *(f"w{number}" for number in range(95))]


def write_word_tokenizer(folder: Path, words: list[str]) -> Path:
    tokenizer = Tokenizer(
        WordLevel({word: token for token, word in enumerate(words)}, unk_token="<unk>")
    )
    tokenizer.pre_tokenizer = WhitespaceSplit()
    tokenizer.add_special_tokens([word for word in words if word.startswith("<")])
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def test_the_tokenizer_is_copied_both_ways(
    tmp_path: Path, tiny_ckpt: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tokenizer = write_word_tokenizer(tmp_path / "tokenizer", WORDS)
    (tokenizer / "README.md").write_text("not needed")
    out, run, back = (str(tmp_path / name) for name in ("out", "run", "back"))
    main(["from-official", str(tiny_ckpt), out, "--tokenizer", str(tokenizer)])
    main(["to-megatron", out, run])
    main(["to-sampler", run, back])
    assert not [record for record in caplog.records if "mask token" in record.message]
    names = {"tokenizer.json", "tokenizer_config.json"}
    assert {path.name for path in (tmp_path / "run/tokenizer").iterdir()} == names
    for directory in (out, back):
        opened = AutoTokenizer.from_pretrained(directory, trust_remote_code=True)
        assert (len(opened), opened.mask_token_id, opened.eos_token_id) == (98, 97, 1)
        assert opened("w3 w0").input_ids == [5, 2]
    for name in names:
        contents = {Path(directory, name).read_bytes() for directory in (out, back)}
        assert len(contents) == 1


def test_the_mask_token_of_an_official_checkpoint_comes_from_its_tokenizer(
    tmp_path: Path, tiny_ckpt: Path, caplog: pytest.LogCaptureFixture
) -> None:
    out = tmp_path / "out"
    tokenizer = write_word_tokenizer(tmp_path / "masked", [*WORDS[:5], "<mask>", *WORDS[5:]])
    main(["from-official", str(tiny_ckpt), str(out), "--tokenizer", str(tokenizer)])
    assert read_description(out)["mask_token_id"] == 5
    assert not caplog.records
    small = write_word_tokenizer(tmp_path / "small", WORDS[:50])
    main(["from-official", str(tiny_ckpt), str(out), "--tokenizer", str(small)])
    assert read_description(out)["mask_token_id"] == 97
    assert "has 51 tokens and the mask token 50, the network 98 and 97" in caplog.text


def test_a_tokenizer_of_another_kind_is_copied_and_a_damaged_one_refused(
    tmp_path: Path, tiny_ckpt: Path
) -> None:
    tokenizer = tmp_path / "tokenizer"
    tokenizer.mkdir()
    (tokenizer / "vocab.txt").write_text("a\nb\n")
    main(["from-official", str(tiny_ckpt), str(tmp_path / "out"), "--tokenizer", str(tokenizer)])
    assert (tmp_path / "out/vocab.txt").read_text() == "a\nb\n"
    (tokenizer / "config.json").write_text("{}")
    arguments = ["from-official", str(tiny_ckpt), str(tmp_path / "out2"), "--tokenizer"]
    with pytest.raises(CheckpointError, match="cannot have this name"):
        main([*arguments, str(tokenizer)])
    (tokenizer / "tokenizer.json").write_text("{")
    with pytest.raises(DataError, match=r"tokenizer\.json: it is not JSON"):
        main([*arguments, str(tokenizer)])
    with pytest.raises(SystemExit) as end:
        main([*arguments, str(tmp_path / "absent")])
    assert end.value.code == 2
    assert not (tmp_path / "out2").exists()
