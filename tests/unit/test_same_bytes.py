"""The differences that the comparison of two commits reports, and those that it ignores."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch.distributed import checkpoint

from tests.structure.same_bytes import compare

TENSORS = {"a.weight": torch.arange(4.0), "b.weight": torch.ones(2)}


def write(root: Path, name: str, content: str | bytes) -> Path:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return root


def compare_texts(folder: Path, name: str, old: str | bytes, new: str | bytes) -> list[str]:
    return compare(write(folder / "old", name, old), write(folder / "new", name, new)).differences


def test_other_bytes_are_found(tmp_path: Path) -> None:
    assert compare_texts(tmp_path, "shards/shard-00000.tar", "x", "y") == [
        "shards/shard-00000.tar: other bytes"
    ]


def test_a_file_of_one_side_is_found(tmp_path: Path) -> None:
    write(tmp_path / "old", "index.json", "{}")
    (tmp_path / "new").mkdir()
    found = compare(tmp_path / "old", tmp_path / "new").differences
    assert found == ["index.json: only the old commit makes it"]
    assert compare(tmp_path / "new", tmp_path / "none").differences == ["nothing is there"]


def test_a_new_key_passes_and_a_lost_or_changed_one_does_not(tmp_path: Path) -> None:
    old = {"model": {"num_layers": 2, "norm_epsilon": 1e-5}}
    for number, (new, found) in enumerate(
        [
            ({"model": {"num_layers": 2, "norm_epsilon": 1e-5, "more": 1}}, []),
            ({"model": {"num_layers": 2}}, ["model.norm_epsilon stands on one side only"]),
            ({"model": {"num_layers": 3, "norm_epsilon": 1e-5}}, ["model.num_layers: 2 and 3"]),
        ]
    ):
        folder = tmp_path / str(number)
        differences = compare_texts(folder, "config.json", json.dumps(old), json.dumps(new))
        assert differences == [f"config.json: {text}" for text in found]


def test_other_times_are_ignored_and_another_loss_is_found(tmp_path: Path) -> None:
    old = '{"step": 1, "train/loss": 0.1, "perf/step_seconds": 1.0}\n'
    assert not compare_texts(tmp_path / "a", "metrics.jsonl", old, old.replace("1.0", "2.0"))
    other = old.replace("0.1", "0.10000000000000002")
    assert compare_texts(tmp_path / "b", "metrics.jsonl", old, other)
    status = '{"state": "finished", "pid": 1}'
    assert not compare_texts(tmp_path / "c", "status.json", status, status.replace("1", "2"))
    assert compare_texts(tmp_path / "d", "status.json", status, status.replace("fin", "unfin"))


def test_code_files_are_listed_and_pass(tmp_path: Path) -> None:
    for side, text in {"old": "x = 1", "new": "x = 2"}.items():
        write(tmp_path / side, "config.json", "{}")
        write(tmp_path / side, "modeling_eso_lm.py", text)
    write(tmp_path / "new", "layers_eso_lm.py", "")
    found = compare(tmp_path / "old", tmp_path / "new")
    assert found.differences == []
    assert found.notes == ["other code in layers_eso_lm.py, modeling_eso_lm.py"]


def test_a_bit_of_a_tensor_is_found(tmp_path: Path) -> None:
    moved = TENSORS["a.weight"].nextafter(torch.tensor(9.0))
    changed = {**TENSORS, "a.weight": moved}
    for side, tensors in {"old": TENSORS, "new": changed}.items():
        (tmp_path / side).mkdir()
        save_file(tensors, tmp_path / side / "model.safetensors")
    found = compare(tmp_path / "old", tmp_path / "new").differences
    assert found == ["model.safetensors: tensor a.weight: other values, 100% of them"]


def test_checkpoints_are_compared_by_their_tensors(tmp_path: Path) -> None:
    changed = {**TENSORS, "b.weight": torch.zeros(2)}
    sides = {"old": TENSORS, "same": TENSORS, "other": changed}
    for side, tensors in sides.items():
        folder = tmp_path / side / "step_00000001"
        checkpoint.save(dict(tensors), checkpoint_id=str(folder), no_dist=True)
    # `.metadata` holds the name of the folder, so its bytes differ although the tensors agree.
    same = compare(tmp_path / "old", tmp_path / "same")
    assert (same.differences, same.notes) == (
        [],
        ["step_00000001: equal tensors in other bytes"],
    )
    other = compare(tmp_path / "old", tmp_path / "other").differences
    assert other == ["step_00000001: tensor b.weight: other values, 100% of them"]
