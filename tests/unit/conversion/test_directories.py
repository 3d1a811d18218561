"""Sampler directories and run directories: round trips, choice of weights, atomicity, refusals."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import Tensor
from transformers import AutoTokenizer

from checkpoints_conversion import sampler_directory
from checkpoints_conversion.__main__ import main
from checkpoints_conversion.parameter_map import map_to_megatron
from checkpoints_conversion.run_network import write_run_directory
from checkpoints_conversion.sampler_directory import write_sampler_directory
from megatron_eso.errors import CheckpointError, ConfigError, DataError
from megatron_eso.runs.checkpoint import open_checkpoint
from megatron_eso.runs.file_index import FILE_INDEX
from megatron_eso.runs.torch_dist import read_metadata, read_tensors, write_tensors
from megatron_eso.sampler import EsoLM
from megatron_eso.sampler.directory import read_description, read_weights
from megatron_eso.sampler.layers_eso_lm import NetworkConfig

ROOT = Path(__file__).parents[3]
STEP_0 = Path("checkpoints/step_00000000")


def describe(config: NetworkConfig) -> dict:
    return {
        **{name: getattr(config, name) for name in NetworkConfig.__dataclass_fields__},
        "alpha_0": 0.5,
        "variant": "b",
        "source": {"kind": "test", "step": 3, "weights": "raw"},
    }


@pytest.fixture
def run_directory(tmp_path: Path, tiny_directory: Path) -> Path:
    main(["to-megatron", str(tiny_directory), str(tmp_path / "run")])
    return tmp_path / "run"


def read_run(directory: Path) -> dict[str, Tensor]:
    index = read_metadata(directory)
    return read_tensors(directory, index, index.state_dict_metadata)


def test_every_network_returns_from_a_run_directory_bit_for_bit(
    tmp_path: Path, config: NetworkConfig, tensors: dict[str, Tensor]
) -> None:
    write_run_directory(tmp_path / "run", describe(config), tensors, tokenizer=None)
    main(["to-sampler", str(tmp_path / "run"), str(tmp_path / "sampler")])
    found = read_weights(tmp_path / "sampler")
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)
    assert NetworkConfig.from_dict(read_description(tmp_path / "sampler")) == config


def test_a_run_directory_names_its_checkpoint_and_says_what_is_in_it(run_directory: Path) -> None:
    assert (run_directory / "checkpoints/latest").read_text().strip() == STEP_0.name
    state = json.loads((run_directory / STEP_0 / "state.json").read_text())
    assert state == {"format_version": 1, "step": 0, "consumed_samples": 0, "kind": "weights"}
    checkpoint = open_checkpoint(run_directory)
    assert checkpoint.config.model.head_bias
    assert checkpoint.config.data.vocab_size == 98
    embedding = read_run(run_directory / STEP_0)["embedding.word_embeddings.weight"]
    assert embedding.shape == (128, 64)
    qkv_bias = read_run(run_directory / STEP_0)["decoder.layers.0.self_attention.linear_qkv.bias"]
    assert not qkv_bias.any()


def test_raw_weights_are_the_float32_main_parameters_where_there_are_any(
    tmp_path: Path, run_directory: Path, tiny_directory: Path
) -> None:
    step = run_directory / STEP_0
    model = read_run(step)
    mains = {f"optimizer.state.fp32_param.{key}": tensor for key, tensor in model.items()}
    shadows = {f"ema.{key}": tensor + 1 for key, tensor in model.items()}
    halves = {key: tensor.bfloat16() for key, tensor in model.items()}
    rewrite(step, halves | mains | shadows)
    convert(run_directory, tmp_path / "raw", "--weights", "raw")
    convert(run_directory, tmp_path / "default")
    expected = read_weights(tiny_directory)
    raw, ema = read_weights(tmp_path / "raw"), read_weights(tmp_path / "default")
    assert all(torch.equal(raw[name], expected[name]) for name in expected)
    assert all(torch.equal(ema[name], expected[name] + 1) for name in expected)
    assert read_description(tmp_path / "default")["source"]["weights"] == "ema"
    rewrite(step, halves)
    with pytest.raises(CheckpointError, match="no EMA"):
        convert(run_directory, tmp_path / "none", "--weights", "ema")
    convert(run_directory, tmp_path / "halves")
    found = read_weights(tmp_path / "halves")
    assert all(torch.equal(found[name], expected[name].bfloat16().float()) for name in expected)


def rewrite(directory: Path, tensors: dict[str, Tensor]) -> None:
    for name in (".metadata", "common.pt", "metadata.json", "__0_0.distcp"):
        (directory / name).unlink()
    (directory / FILE_INDEX).unlink(missing_ok=True)
    write_tensors(directory, tensors)


def convert(run: Path, out: Path, *options: str) -> None:
    main(["to-sampler", str(run), str(out), *options])


def test_residual_gates_are_folded(tmp_path: Path, run_directory: Path) -> None:
    step = run_directory / STEP_0
    tensors = read_run(step)
    gates = {
        f"decoder.layers.{i}.{name}.gate": torch.full((64,), 2.0)
        for i in range(3)
        for name in ("self_attention.linear_proj", "mlp.linear_fc2")
    }
    rewrite(step, tensors | gates)
    path = step / "config.json"
    config = json.loads(path.read_text())
    config["model"]["residual_gates"] = True
    path.write_text(json.dumps(config))
    convert(run_directory, tmp_path / "out")
    found = read_weights(tmp_path / "out")
    name = "decoder.layers.1.mlp.linear_fc2.bias"
    assert torch.equal(found["layers.1.mlp.down_proj.bias"], 2 * tensors[name])


def test_the_newest_checkpoint_is_taken_unless_told(tmp_path: Path, run_directory: Path) -> None:
    """Take the newest complete checkpoint, even if `latest` names another."""
    other = run_directory / "checkpoints/step_00000005"
    shutil.copytree(run_directory / STEP_0, other)
    state = json.loads((other / "state.json").read_text())
    (other / "state.json").write_text(json.dumps(state | {"step": 5}))
    (other / FILE_INDEX).unlink()
    assert (run_directory / "checkpoints/latest").read_text() == f"{STEP_0.name}\n"
    convert(run_directory, tmp_path / "newest")
    convert(run_directory, tmp_path / "told", "--step", "0")
    assert read_description(tmp_path / "newest")["source"]["step"] == 5
    assert read_description(tmp_path / "told")["source"]["step"] == 0
    with pytest.raises(ConfigError, match="step_00000005"):
        convert(run_directory, tmp_path / "none", "--step", "6")
    with pytest.raises(SystemExit) as end:
        convert(run_directory, tmp_path / "none", "--step", "-1")
    assert end.value.code == 2


def test_equal_weights_give_equal_bytes(tmp_path: Path, run_directory: Path) -> None:
    """Also when another number of files and another order hold them."""
    step = run_directory / STEP_0
    convert(run_directory, tmp_path / "a")
    rewrite(step, dict(reversed(read_run(step).items())))
    config = json.loads((step / "config.json").read_text())
    config["parallel"]["tensor_model_parallel_size"] = 2
    config["run"]["directory"] = "elsewhere"
    (step / "config.json").write_text(json.dumps(config))
    convert(run_directory, tmp_path / "b")
    digests = [
        {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(out.iterdir())}
        for out in (tmp_path / "a", tmp_path / "b")
    ]
    assert digests[0] == digests[1]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_weights_are_stored_in_the_dtype_asked_for(
    tmp_path: Path, run_directory: Path, tiny_directory: Path, dtype: str
) -> None:
    convert(run_directory, tmp_path / "out", "--dtype", dtype)
    found, expected = read_weights(tmp_path / "out"), read_weights(tiny_directory)
    wanted = getattr(torch, dtype)
    assert all(torch.equal(found[name], expected[name].to(wanted)) for name in expected)
    assert read_description(tmp_path / "out")["dtype"] == dtype


def test_large_weights_are_sharded_with_an_index(
    tmp_path: Path, tiny_directory: Path, tiny_model: EsoLM, golden: dict[str, Tensor]
) -> None:
    write_sampler_directory(
        tmp_path / "sharded",
        read_description(tiny_directory),
        read_weights(tiny_directory),
        dtype=torch.float32,
        tokenizer=None,
        max_shard_bytes=100_000,
    )
    files = sorted(path.name for path in (tmp_path / "sharded").glob("*.safetensors"))
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    assert len(files) > 2
    index = json.loads((tmp_path / "sharded/model.safetensors.index.json").read_text())
    for name in files:
        held = load_file(tmp_path / "sharded" / name)
        assert {k for k, v in index["weight_map"].items() if v == name} == held.keys()
    probe = golden["b.diffusion.z_t"], golden["b.diffusion.permutation"]
    found = EsoLM.from_pretrained(tmp_path / "sharded").diffusion_logits(*probe)
    assert torch.equal(found, tiny_model.diffusion_logits(*probe))


def write_word_tokenizer(folder: Path, words: list[str]) -> Path:
    tokenizer = Tokenizer(
        WordLevel({word: token for token, word in enumerate(words)}, unk_token="<unk>")
    )
    tokenizer.pre_tokenizer = WhitespaceSplit()
    tokenizer.add_special_tokens([word for word in words if word.startswith("<")])
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


WORDS = ["<unk>", "</s>", *(f"w{number}" for number in range(95))]


def test_the_tokenizer_travels_both_ways(
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


def test_the_mask_token_of_an_official_checkpoint_is_its_tokenizers(
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


def test_a_directory_appears_complete_or_not_at_all(
    tmp_path: Path, tiny_ckpt: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    main(["from-official", str(tiny_ckpt), str(out)])
    before = {path.name: path.read_bytes() for path in out.iterdir()}

    def fail(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(sampler_directory, "save_file", fail)
    with pytest.raises(CheckpointError, match="No space left"):
        main(["from-official", str(tiny_ckpt), str(out), "--weights", "raw"])
    monkeypatch.undo()
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    main(["from-official", str(tiny_ckpt), str(out), "--weights", "raw"])
    assert read_description(out)["source"]["weights"] == "raw"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_foreign_directory_is_not_replaced(
    tmp_path: Path, tiny_ckpt: Path, tiny_directory: Path, run_directory: Path
) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").write_text("years of work")
    with pytest.raises(ConfigError, match="holds something else"):
        main(["from-official", str(tiny_ckpt), str(tmp_path / "mine")])
    with pytest.raises(ConfigError, match="holds something else"):
        main(["to-megatron", str(tiny_directory), str(run_directory)])
    assert (tmp_path / "mine/thesis.txt").read_text() == "years of work"


def test_verify_tells_equal_from_different(
    tmp_path: Path,
    run_directory: Path,
    tiny_directory: Path,
    tiny_ckpt: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    step = run_directory / STEP_0
    places = [str(tiny_directory), str(run_directory), str(step), str(tiny_ckpt)]
    for other in places[1:]:
        assert main(["verify", places[0], other]) == 0
        assert "53 of 53 equal" in capsys.readouterr().out
    assert main(["verify", places[0], places[3], "--weights", "raw"]) == 1
    tensors = read_run(step)
    tensors["decoder.final_layernorm.weight"][5] += 1
    rewrite(step, tensors)
    assert main(["verify", places[0], places[1]]) == 1
    assert "1 in norm.weight" in capsys.readouterr().out
    with pytest.raises(CheckpointError, match="neither a sampler directory"):
        main(["verify", places[0], str(tmp_path)])


def test_verify_tells_other_networks_apart(
    tmp_path: Path,
    config: NetworkConfig,
    tensors: dict[str, Tensor],
    tiny_directory: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    write_run_directory(tmp_path / "run", describe(config), tensors, tokenizer=None)
    assert main(["verify", str(tiny_directory), str(tmp_path / "run")]) == 1
    out = capsys.readouterr().out
    assert "configurations differ: hidden_size: 64 and 16" in out
    assert "tensors in A only: layers.2.input_layernorm.weight" in out
    assert "NOT the same network" in out


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("state.json", '{"format_version": 2, "step": 0}', "format_version"),
        ("state.json", "{", "state.json"),
        ("metadata.json", '{"sharded_backend": "zarr"}', "zarr"),
        ("__0_0.distcp", "", "damaged"),
        (".metadata", "", "checkpoint's index"),
    ],
)
def test_a_damaged_checkpoint_is_refused(
    tmp_path: Path, run_directory: Path, name: str, content: str, message: str
) -> None:
    (run_directory / STEP_0 / name).write_text(content)
    with pytest.raises(CheckpointError, match=f"{name}: has {len(content)} bytes"):
        convert(run_directory, tmp_path / "out")
    (run_directory / STEP_0 / FILE_INDEX).unlink()  # as other programs write them
    with pytest.raises(CheckpointError, match=message):
        convert(run_directory, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_unfinished_checkpoint_is_not_taken(tmp_path: Path, run_directory: Path) -> None:
    (run_directory / STEP_0 / ".metadata").unlink()
    with pytest.raises(CheckpointError, match="no complete checkpoint"):
        convert(run_directory, tmp_path / "out")
    shutil.rmtree(run_directory / STEP_0)
    with pytest.raises(CheckpointError, match="no complete checkpoint; there are none"):
        convert(run_directory, tmp_path / "out")


def test_a_configuration_of_another_model_is_refused(
    tmp_path: Path, config: NetworkConfig, tensors: dict[str, Tensor]
) -> None:
    write_run_directory(tmp_path / "run", describe(config), tensors, tokenizer=None)
    step = tmp_path / "run" / STEP_0
    rewrite(
        step,
        map_to_megatron(config, tensors, padded_vocab_size=128)
        | {"decoder.layers.0.mlp.linear_fc2.weight": torch.zeros(16, 25)},
    )
    with pytest.raises(CheckpointError, match="layers.0.mlp.down_proj.weight"):
        convert(tmp_path / "run", tmp_path / "out")


def test_a_run_of_another_objective_is_refused(tmp_path: Path, run_directory: Path) -> None:
    step = run_directory / STEP_0
    config = json.loads((step / "config.json").read_text())
    config["objective"] = {"name": "any_order_ar"}
    (step / "config.json").write_text(json.dumps(config))
    (step / FILE_INDEX).unlink()
    for arguments in (["to-sampler", str(run_directory)], ["verify", str(run_directory)]):
        with pytest.raises(CheckpointError, match="name = any_order_ar: the sampler knows eso_lm"):
            main([*arguments, str(tmp_path / "out" if "to" in arguments[0] else run_directory)])
    assert not (tmp_path / "out").exists()


def test_exit_codes_and_one_line_errors(tmp_path: Path) -> None:
    for arguments, code in (
        (["from-official", str(tmp_path / "nowhere"), str(tmp_path / "out")], 2),
        (["from-official"], 2),
    ):
        command = [sys.executable, "-m", "checkpoints_conversion", *arguments]
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
        assert done.returncode == code
        assert "Traceback" not in done.stderr
    assert done.stdout == ""


HUGGING_FACE = """
import sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("megatron_eso", "megatron", "checkpoints_conversion"):
            raise ImportError(name)

sys.meta_path.insert(0, Refuse())
import torch, transformers
from safetensors.torch import load_file

golden = load_file(sys.argv[2])
for auto in (transformers.AutoModel, transformers.AutoModelForMaskedLM):
    model = auto.from_pretrained(sys.argv[1], trust_remote_code=True)
    z_t, permutation = golden["b.diffusion.z_t"], golden["b.diffusion.permutation"]
    logits = model(z_t, permutation).logits
    assert (logits - golden["b.diffusion.logits"]).abs().max() < 1e-4
    z_0, permutation = golden["b.sequential.z_0"], golden["b.sequential.permutation"]
    logits = model(z_0, permutation, golden["b.diffusion.x0"]).logits
    is_masked = z_0.gather(1, permutation) == 97
    assert (logits - golden["b.sequential.logits"])[is_masked].abs().max() < 1e-4
    assert not logits[~is_masked].any()
    assert model(z_t).logits.shape == logits.shape
model.save_pretrained(sys.argv[3])
"""


@pytest.mark.slow
def test_transformers_loads_the_directory_without_this_package(
    tmp_path: Path, tiny_directory: Path
) -> None:
    pytest.importorskip("transformers")
    golden = ROOT / "tests/golden/tiny.safetensors"
    environment = {**os.environ, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1"}
    environment.pop("PYTHONPATH", None)
    arguments = [str(tiny_directory), str(golden), str(tmp_path / "saved")]
    done = subprocess.run(
        [sys.executable, "-c", HUGGING_FACE, *arguments],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert EsoLM.from_pretrained(tmp_path / "saved").config.max_length == 48


def test_a_sampler_directory_that_is_replaced_is_named(
    tmp_path: Path, run_directory: Path, caplog: pytest.LogCaptureFixture
) -> None:
    out = tmp_path / "out"
    convert(run_directory, out)
    assert not caplog.messages
    convert(run_directory, out)
    assert caplog.messages == [f"{out}: is a sampler directory already, and is replaced"]


def test_the_steps_that_there_are_are_listed_in_plain_text(
    tmp_path: Path, run_directory: Path
) -> None:
    with pytest.raises(ConfigError, match="no complete checkpoint; there are step_00000000$"):
        main(["to-sampler", str(run_directory), str(tmp_path / "out"), "--step", "7"])
