"""Checkpoints whose pickles name foreign objects or code are read, and no code runs."""

import builtins
import os
import pickle
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp

from checkpoints_conversion.__main__ import main
from megatron_eso.errors import CheckpointError
from megatron_eso.runs.torch_dist import read_metadata, read_tensors, write_tensors
from megatron_eso.runs.unpickling import load_torch_file, plain_value

TOKENIZER_MODULE = '''
from pathlib import Path

Path({marker!r}).write_text("imported")


class Tokenizer(dict):
    """A foreign class with state, items and a custom rebuild, as in real checkpoints."""

    def __init__(self, name):
        self.name = name
        self["piece"] = 1

    def __setstate__(self, state):
        Path({marker!r}).write_text("state set")
        self.__dict__.update(state)


def save(source, target, wrap):
    import torch

    from megatron_eso.runs.unpickling import load_torch_file

    checkpoint = load_torch_file(source)
    checkpoint["hyper_parameters"] = {{
        "config": {{"model": {{"length": 48}}, "algo": {{"alpha_0": 0.25}}}},
        "tokenizer": Tokenizer("gpt2"),
    }}
    torch.save(checkpoint, target)
'''


class Hostile:
    """An object whose pickle calls `function(*args)`."""

    def __init__(self, function, *args):
        self.call = (function, args)

    def __reduce__(self):
        return self.call


def hostile_objects(marker: Path) -> list[Hostile]:
    code = f"open({str(marker)!r}, 'w').close()"
    return [
        Hostile(os.system, f"touch {marker}"),
        Hostile(builtins.exec, code),
        Hostile(builtins.eval, f"open({str(marker)!r}, 'w')"),
        Hostile(builtins.getattr, Hostile(builtins.__import__, "os"), "system"),
        Hostile(builtins.open, str(marker), "w"),
        Hostile(subprocess.call, ["touch", str(marker)]),
        Hostile(torch.load, str(marker)),
    ]


def test_a_checkpoint_with_a_tokenizer_object_is_read_without_its_class(
    tiny_ckpt: Path, tmp_path: Path
) -> None:
    marker, checkpoint = tmp_path / "marker", tmp_path / "with_tokenizer.ckpt"
    (tmp_path / "foreign_tokenizer.py").write_text(TOKENIZER_MODULE.format(marker=str(marker)))
    program = (
        f"import foreign_tokenizer as f; f.save({str(tiny_ckpt)!r}, {str(checkpoint)!r}, None)"
    )
    root = Path(__file__).parents[3]
    path = os.pathsep.join([str(tmp_path), str(root)])
    subprocess.run(
        [sys.executable, "-c", program], check=True, env={**os.environ, "PYTHONPATH": path}
    )
    marker.unlink()
    sys.path.insert(0, str(tmp_path))  # the class could be imported, and must not be
    try:
        main(["from-official", str(checkpoint), str(tmp_path / "out")])
    finally:
        sys.path.remove(str(tmp_path))
    assert (tmp_path / "out" / "model.safetensors").is_file()
    assert not marker.exists()
    assert "foreign_tokenizer" not in sys.modules


@pytest.mark.parametrize("case", range(7))
@pytest.mark.parametrize("place", ["hyper_parameters", "state_dict", "ema"])
def test_a_checkpoint_that_would_run_code_is_read_without_running_it(
    tiny_ckpt: Path, tmp_path: Path, case: int, place: str
) -> None:
    marker = tmp_path / "marker"
    checkpoint = load_torch_file(tiny_ckpt)
    checkpoint["hyper_parameters"] = plain_value(checkpoint["hyper_parameters"])
    checkpoint[place]["hostile"] = hostile_objects(marker)[case]
    torch.save(checkpoint, tmp_path / "hostile.ckpt")
    main(["from-official", str(tmp_path / "hostile.ckpt"), str(tmp_path / "out")])
    assert (tmp_path / "out" / "model.safetensors").is_file()
    assert not marker.exists()


def test_the_hostile_objects_would_run_code(tmp_path: Path) -> None:
    """Otherwise the tests above could pass because the objects are harmless."""
    for number, hostile in enumerate(hostile_objects(tmp_path / "marker")[:3]):
        pickle.loads(pickle.dumps(hostile))
        assert (tmp_path / "marker").exists(), number
        (tmp_path / "marker").unlink()


def test_files_that_are_no_zip_checkpoint_are_refused(tiny_ckpt: Path, tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    cases = {
        "old": pickle.dumps(Hostile(os.system, f"touch {marker}")),
        "empty": b"",
        "truncated": tiny_ckpt.read_bytes()[:-3000],
    }
    for name, content in cases.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(CheckpointError, match="not a zip-format"):
            load_torch_file(tmp_path / name)
    with pytest.raises(CheckpointError, match="not found"):
        load_torch_file(tmp_path / "nowhere")
    assert not marker.exists()


def test_a_torchscript_archive_and_a_damaged_pickle_are_refused(tmp_path: Path) -> None:
    torch.jit.script(torch.nn.Linear(2, 2)).save(tmp_path / "script.pt")
    with pytest.raises(CheckpointError, match="TorchScript"):
        load_torch_file(tmp_path / "script.pt")
    torch.save({"a": torch.zeros(3)}, tmp_path / "good.pt")
    with (
        zipfile.ZipFile(tmp_path / "good.pt") as good,
        zipfile.ZipFile(tmp_path / "bad.pt", "w") as bad,
    ):
        for name in good.namelist():
            content = good.read(name)
            bad.writestr(name, content[:20] if name.endswith("data.pkl") else content)
    with pytest.raises(CheckpointError, match="damaged"):
        load_torch_file(tmp_path / "bad.pt")


def test_an_index_that_would_run_code_is_refused_and_byte_entries_are_not_loaded(
    tmp_path: Path,
) -> None:
    marker = tmp_path / "marker"
    write_tensors(tmp_path / "good", {"a": torch.arange(3.0)})
    dcp.save(
        {"a": torch.arange(3.0), "object": Hostile(os.system, f"touch {marker}")},
        storage_writer=dcp.FileSystemWriter(tmp_path / "objects"),
    )
    for name in ("metadata.json", "common.pt"):
        (tmp_path / "objects" / name).write_bytes((tmp_path / "good" / name).read_bytes())
    index = read_metadata(tmp_path / "objects")
    assert torch.equal(read_tensors(tmp_path / "objects", index, ["a"])["a"], torch.arange(3.0))
    with pytest.raises(CheckpointError, match="no tensor object"):
        read_tensors(tmp_path / "objects", index, ["object"])
    assert not marker.exists()

    hostile = pickle.dumps(Hostile(os.system, f"touch {marker}"))
    (tmp_path / "good" / ".metadata").write_bytes(hostile)
    with pytest.raises(CheckpointError, match="checkpoint's index"):
        read_metadata(tmp_path / "good")
    assert not marker.exists()
