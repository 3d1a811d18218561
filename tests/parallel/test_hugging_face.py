"""A run starts from weights of transformers with their loss, and goes back to transformers."""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForCausalLM

from checkpoints_conversion.__main__ import main as convert
from data_tools.builds.dataset import BuildOptions, build_dataset
from megatron_eso.sampler import load
from tests.ranks.training import open_batches, train_tiny
from tests.support.hugging_face import make_gpt2
from tests.support.hugging_face_models import MODELS, save_model
from tests.support.training import Overrides, tiny_config
from tests.support.world import World

pytestmark = pytest.mark.parallel

LOSS_TOLERANCE = 1e-5
LOGITS_TOLERANCE = 1e-5
RUNS = ("llama", "llama 3.1, wide heads", "qwen2, tied", "qwen3")
BATCH_SIZE = 4


@pytest.fixture(scope="module")
def data(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build shards by a tokenizer without a mask token."""
    folder = tmp_path_factory.mktemp("gpt2")
    make_gpt2().save(str(folder / "tokenizer.json"))
    options = BuildOptions(
        inputs=[str(tiny_data.parent / "texts")],
        tokenizer=str(folder / "tokenizer.json"),
        out=folder / "shards",
        validation_share=0.1,
        record_tokens=4096,
        shard_records=4,
    )
    build_dataset(options)
    return folder


def describe_run(name: str, start: Path) -> Overrides:
    """Return the keys of a run with the shape of a model of `MODELS`, which starts from weights."""
    config = json.loads((start / "checkpoints" / "step_00000000" / "config.json").read_text())
    keys = ("num_layers", "hidden_size", "num_attention_heads", "num_query_groups", "kv_channels")
    keys += ("ffn_hidden_size", "normalization", "norm_epsilon", "activation", "rotary_base")
    keys += ("qk_layernorm", "add_bias_linear", "add_qkv_bias")
    keys += ("share_embeddings_and_output_weights", "rope_scaling")
    if config["model"]["rope_scaling"]:
        keys += ("rope_scaling_factor", "rope_low_freq_factor", "rope_high_freq_factor")
        keys += ("rope_original_length",)
    return {
        **{f"model.{key}": json.dumps(config["model"][key]) for key in keys},
        "objective.name": '"ar"',
        "objective.prepend_token": '"none"',
        "checkpoint.init_from": json.dumps(str(start)),
        "train.global_batch_size": BATCH_SIZE,
    }


@torch.no_grad()
def compute_loss(model: torch.nn.Module, texts: Tensor) -> float:
    logits = model(texts).logits[:, :-1]
    return float(F.cross_entropy(logits.flatten(0, 1), texts[:, 1:].flatten()))


@pytest.mark.parametrize("name", RUNS)
def test_a_run_has_the_loss_of_transformers_and_is_exported(
    name: str, world: World, data: Path, tmp_path: Path
) -> None:
    assert name in MODELS
    num_tokens = make_gpt2().get_vocab_size()
    model = save_model(tmp_path / "hf", name, vocab_size=num_tokens)
    (tmp_path / "hf" / "tokenizer.json").write_bytes((data / "tokenizer.json").read_bytes())
    convert(["from-hf", str(tmp_path / "hf"), str(tmp_path / "start")])
    convert(["to-megatron", str(tmp_path / "start"), str(tmp_path / "megatron")])
    overrides = describe_run(name, tmp_path / "megatron")
    run, shards = tmp_path / "run", data / "shards"
    (trained,) = world.run(train_tiny, 1, run, shards, overrides, 2)
    # The first loss, on the same texts.
    batches = open_batches(tiny_config(run, shards, overrides), 1)
    texts = torch.from_numpy(batches.data.samples(torch.arange(BATCH_SIZE).numpy()))
    expected = compute_loss(model, texts)
    assert trained.losses[0] == pytest.approx(expected, rel=LOSS_TOLERANCE)
    # The trained weights.
    convert(["to-sampler", str(run), str(tmp_path / "sampler"), "--weights", "raw"])
    convert(["to-hf", str(tmp_path / "sampler"), str(tmp_path / "back")])
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "back")
    assert type(again) is type(model)
    with torch.no_grad():
        logits = again(texts).logits
        moved = (logits - model(texts).logits).abs().max()
    found = load(tmp_path / "sampler").logits(texts)[..., :num_tokens]
    print(
        f"{name}: first loss {trained.losses[0]:.6f}, transformers {expected:.6f}; logits differ "
        f"by {float((found - logits).abs().max()):.1e}, two steps moved them by {float(moved):.1e}"
    )
    torch.testing.assert_close(found, logits, atol=LOGITS_TOLERANCE, rtol=0)
    assert moved > 1000 * LOGITS_TOLERANCE
