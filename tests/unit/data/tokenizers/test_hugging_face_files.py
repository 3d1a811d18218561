"""Files of `tokenizer.json`: fingerprints, saved copies, and damage in one line."""

import copy
import json
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from megatron_eso.data.tokenizers.tokenizer import Tokenizer
from megatron_eso.errors import DataError
from tests.support.hugging_face import TEXT, load_changed

ROOT = Path(__file__).parents[4]

PREFIX = b'"continuing_subword_prefix":"x"'


def test_the_fingerprint_differs_where_ids_differ(contents: dict[str, bytes]) -> None:
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
    # The library cuts prefixes off merges unchecked; where one lacks it, the process aborts.
    cases += [contents["gpt2"].replace(b'"continuing_subword_prefix":null', PREFIX)]
    for case in cases:
        path.write_bytes(case)
        with pytest.raises(DataError, match=r"tokenizer\.json: .*; copy it again or give another$"):
            Tokenizer.load(tmp_path)
    # Other files of the folder that are not JSON, or that hold another tokenizer.
    path.write_bytes(content)
    (tmp_path / "tokenizer_config.json").write_text("[]")
    with pytest.raises(DataError, match="tokenizer_config.json is not a JSON object"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer_config.json").unlink()
    (tmp_path / "tokenizer.model").write_bytes(b"model")
    with pytest.raises(DataError, match=r"holds both tokenizer\.model and tokenizer\.json"):
        Tokenizer.load(tmp_path)
    Tokenizer.load(path)


def test_threads_of_the_library_do_not_matter(contents: dict[str, bytes], tmp_path: Path) -> None:
    """Encode with one thread and equal ids, whatever the environment variable says."""
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
