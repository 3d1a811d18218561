"""The command lines that `compare_commits` runs with both checkouts, and what they make.

Paths are relative to the folder of a checkout, so that both write the same ones into their files.
"""

from dataclasses import dataclass
from pathlib import Path

GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "tiny.ckpt"
SHARDS = ["data.train=shards/train", "data.validation=shards/validation"]
TINY = {
    "model.num_layers": 2,
    "model.hidden_size": 32,
    "model.num_attention_heads": 2,
    "data.sequence_length": 32,
    "train.num_steps": 6,
    "train.global_batch_size": 8,
    "train.micro_batch_size": 2,
    "train.log_interval": 1,
    "validation.interval": 3,
    "validation.num_samples": 16,
    "checkpoint.interval": 3,
    "optimizer.learning_rate": 0.01,
    "optimizer.lr_warmup_steps": 2,
}
MIXED = {
    "objective.loss_type": "elbo",
    "train.precision": "bf16",
    "optimizer.ema_decay": 0.9,
    "model.hidden_dropout": 0.1,
    "data.ssl_ratio": 0.2,
    "parallel.use_distributed_optimizer": "true",
    "parallel.overlap_grad_reduce": "true",
    "parallel.overlap_param_gather": "true",
}
TENSOR_PARALLEL = {
    "objective.alpha_0": 0.5,
    "objective.loss_type": "low_var",
    "model.normalization": "RMSNorm",
    "model.activation": "swiglu",
    "model.qk_layernorm": "true",
    "model.add_bias_linear": "false",
    "parallel.tensor_model_parallel_size": 2,
    "parallel.sequence_parallel": "true",
}
PIPELINE_PARALLEL = {
    "objective.alpha_0": 1.0,
    "model.share_embeddings_and_output_weights": "true",
    "model.residual_gates": "true",
    "optimizer.ema_decay": 0.9,
    "parallel.pipeline_model_parallel_size": 2,
}
SEQUENTIAL = {
    "objective.alpha_0": 0.0,
    "optimizer.lr_decay_style": "cosine",
    "checkpoint.init_from": "runs/start",
}
REFUSED = (
    "objective.alpha_0=2",
    "model.hidden_size=33",
    "model.num_layer=2",
    "train.global_batch_size=7",
    "train.precision=fp8",
    "train.num_steps=many",
    "parallel.tensor_model_parallel_size=3",
)


@dataclass(frozen=True, kw_only=True)
class Command:
    """A command line, as both checkouts run it."""

    title: str
    arguments: list[str]
    num_ranks: int = 0
    """Ranks of a torchrun; 0 for a plain process."""
    exit_code: int = 0
    shows: str = ""
    """What of its output is compared: `stdout`, `stderr`, `lines` (the new one may add some)."""


def overrides(*sections: dict[str, object]) -> list[str]:
    """Format settings as a command line; the later value of a key wins."""
    merged: dict[str, object] = {}
    for section in sections:
        merged |= section
    return [*SHARDS, *(f"{key}={value}" for key, value in merged.items())]


def train(title: str, run: str, num_ranks: int, *sections: dict[str, object]) -> Command:
    """Plan a training job in `runs/RUN`."""
    arguments = ["pretrain.train", f"run.directory=runs/{run}", *overrides(TINY, *sections)]
    return Command(title=title, arguments=arguments, num_ranks=num_ranks)


def plan_data() -> list[Command]:
    """Plan text, tokenizer and shards."""
    tools = "data_tools"
    build = ["build", "--input", "corpus.jsonl", "--tokenizer", "tokenizer", "--out", "shards"]
    sizes = ["--record-tokens", "4096", "--shard-records", "4"]
    tokenizer = ["--input", "corpus.jsonl", "--vocab-size", "400", "--out", "tokenizer"]
    return [
        Command(title="corpus", arguments=[tools, "corpus", "--out", "corpus.jsonl"]),
        Command(title="train-tokenizer", arguments=[tools, "train-tokenizer", *tokenizer]),
        Command(
            title="build",
            arguments=[tools, *build, "--validation", "0.1", "--workers", "2", *sizes],
        ),
        Command(
            title="inspect",
            arguments=[tools, "inspect", "shards/train", "--json"],
            shows="stdout",
        ),
        Command(
            title="order",
            arguments=[tools, "order", *dry_run_arguments(), "--sample", "5", "--json"],
            shows="stdout",
        ),
    ]


def dry_run_arguments() -> list[str]:
    """Return the arguments of a dry run."""
    return ["run.directory=runs/none", *overrides(TINY)]


def plan_configuration() -> list[Command]:
    """Dry runs, and command lines that are refused."""
    dry = ["pretrain.train", *dry_run_arguments()]
    layouts = {
        "dry run": [],
        "dry run, 8 ranks": ["--world-size", "8", "parallel.tensor_model_parallel_size=2"],
    }
    shown = [
        Command(title=title, arguments=[*dry, *more, "--dry-run"], shows="lines")
        for title, more in layouts.items()
    ]
    refused = [
        Command(
            title=f"refused: {setting}",
            arguments=[*dry, setting, "--dry-run"],
            exit_code=2,
            shows="stderr",
        )
        for setting in REFUSED
    ]
    missing = Command(
        title="refused: a missing dataset",
        arguments=["data_tools", "inspect", "nowhere"],
        exit_code=1,
        shows="stderr",
    )
    return [*shown, *refused, missing]


def plan_runs() -> list[Command]:
    """Training on several layouts, with conversions between them."""
    convert = "checkpoints_conversion"
    return [
        train("train 1 rank", "one", 1),
        Command(
            title="to-sampler 1 rank",
            arguments=[convert, "to-sampler", "runs/one", "samplers/one"],
        ),
        Command(
            title="to-megatron",
            arguments=[convert, "to-megatron", "samplers/one", "runs/start"],
        ),
        train("train alpha_0=0 from these weights", "sequential", 1, SEQUENTIAL),
        train("train DP=2 bf16, first half", "mixed", 2, MIXED, {"train.num_steps": 3}),
        train("train DP=2 bf16, resumed", "mixed", 2, MIXED),
        train("train TP=2 SP low_var", "tensor", 2, TENSOR_PARALLEL),
        train("train PP=2 alpha_0=1", "pipeline", 2, PIPELINE_PARALLEL),
    ]


def plan_conversions() -> list[Command]:
    """Plan evaluation, conversions, generation and scoring."""
    # Options that several commands share.
    convert, sampler = "checkpoints_conversion", "megatron_eso.sampler"
    prompt = ["--prompt", "The ", "--steps", "6", "--alpha-0", "0.5", "--top-p", "0.9"]
    raw = ["--step", "3", "--weights", "raw", "--dtype", "bfloat16"]
    # First the conversions of each layout, then generation and scores.
    return [
        Command(
            title="evaluate",
            arguments=["pretrain.evaluate", "runs/mixed", "--any-order", "2"],
            shows="stdout",
        ),
        Command(
            title="to-sampler DP=2 bf16",
            arguments=[convert, "to-sampler", "runs/mixed", "samplers/mixed"],
        ),
        Command(
            title="to-sampler TP=2",
            arguments=[convert, "to-sampler", "runs/tensor", "samplers/tensor", *raw],
        ),
        Command(
            title="to-sampler PP=2",
            arguments=[convert, "to-sampler", "runs/pipeline", "samplers/pipeline"],
        ),
        Command(
            title="from-official",
            arguments=[convert, "from-official", str(GOLDEN), "samplers/official"],
        ),
        Command(
            title="sample",
            arguments=[sampler, "sample", "samplers/one", "--num-samples", "3", "--seed", "7"],
            shows="stdout",
        ),
        Command(
            title="sample a prompt",
            arguments=[sampler, "sample", "samplers/tensor", "--seed", "7", *prompt],
            shows="stdout",
        ),
        Command(
            title="score",
            arguments=[sampler, "score", "samplers/mixed", "scored.jsonl"],
            shows="stdout",
        ),
    ]


def list_products() -> dict[str, str]:
    """List what is compared, and where it lies in the folder of a checkout."""
    data = {
        "text of the corpus": "corpus.jsonl",
        "tokenizer": "tokenizer",
        "shards, training": "shards/train",
        "shards, validation": "shards/validation",
        "start from a sampler": "runs/start",
    }
    parts = ("metrics.jsonl", "config.json", "status.json", "tokenizer", "checkpoints")
    runs = ("one", "sequential", "mixed", "tensor", "pipeline")
    samplers = ("one", "mixed", "tensor", "pipeline", "official")
    return (
        data
        | {f"run {run}: {part}": f"runs/{run}/{part}" for run in runs for part in parts}
        | {f"sampler directory {name}": f"samplers/{name}" for name in samplers}
    )


def plan_everything() -> list[Command]:
    """All commands, in order."""
    return [*plan_data(), *plan_configuration(), *plan_runs(), *plan_conversions()]
