"""The configuration: one frozen dataclass for each TOML section, with all values resolved.

Keys have the names of Megatron-Core or of the Eso-LM paper (arXiv 2506.01928). `keys.py` describes
the annotations of a key. A derived value (`DERIVED`) that the user leaves out is computed when its
section is built; `validation.micro_batch_size` is computed with the whole. `combinations.py` checks
combinations of keys, and `loading.py` reads files. The sections `objective` and `model` are in
their own files.
"""

import dataclasses
import typing
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt, Interval

from megatron_eso.config.keys import DERIVED, Frozen, Key, Largest, Location, Logged, describe_keys
from megatron_eso.config.model import ModelConfig
from megatron_eso.config.objective import ObjectiveConfig

FORMAT_VERSION = 2

# The largest values: beyond any machine or use, and small enough that nothing overflows.
MAX_BATCH = 2**31 - 1
MAX_TOKENS = 2**22
"""Largest number of tokens of a micro-batch, which is planned as a whole."""
MAX_PARTS = 2**20
MAX_PREFETCH_STEPS = 10_000
MAX_SECONDS = 10**9
MAX_GIB = 10**9
MAX_WEIGHT = 10**18
MAX_RATE = 1000
MAX_NORM = 10**9
MAX_DEVIATIONS = 10**9


@dataclass(frozen=True, kw_only=True, slots=True)
class RunConfig:
    """Directory and seed of the run."""

    directory: Annotated[str, Location()]
    """Run directory for logs, metrics and checkpoints; a run resumes from its checkpoints."""
    seed: Annotated[int, Ge(0), Frozen("run")] = 1
    """Key of everything random: sample order, noise, initial weights, dropout."""
    wandb_project: str | None = None
    """Project of Weights & Biases that also receives the curves; left out: none."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Vocabulary:
    """The token ids of a run."""

    size: int
    """Ids of the tokenizer, the mask token included; the embedding of a model is padded beyond."""
    mask_token_id: int
    """The mask token; it never occurs in a text and is never predicted."""
    bos_token_id: int | None = None
    """The token at the start of a text; None: the tokenizer has none."""
    eos_token_id: int | None = None
    """The token that ends a document; None: not known."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    """Token shards."""

    train: Annotated[str | tuple[str, ...], Location(may_be_url=True)]
    """Directory or URL of the training shards, or a list of them: a blend of corpora."""
    train_weights: Annotated[tuple[float, ...] | None, Largest(MAX_WEIGHT)] = None
    """Shares of the corpora in the samples, in any unit; left out: their numbers of data rows."""
    phase: Annotated[int, Gt(0)] = 1
    """Number of the blend within the run: raise it by one to change the blend on resume."""
    validation: Annotated[str | None, Location(may_be_url=True)] = None
    """Directory or URL of the validation shards."""
    sequence_length: Annotated[int, Gt(0), Largest(MAX_TOKENS), Frozen("run"), Logged()]
    """Tokens of a sample."""
    framing: Annotated[Literal["none", "bos_eos"], Frozen("run"), Logged()] = "none"
    """`bos_eos`: BOS first and EOS last in every sample, in place of two tokens of text."""
    ssl_ratio: Annotated[float, Interval(ge=0, lt=1)] = 0.0
    """Share of the training samples that are cut to a random length."""
    vocab_size: Annotated[int | None, Gt(0), Largest(MAX_BATCH), Frozen("weights")] = None
    """Tokens of the vocabulary, the mask token included; left out: that of the shards."""
    mask_token_id: Annotated[int | None, Ge(0), Frozen("weights")] = None
    """The mask token; left out: that of the shards."""
    bos_token_id: Annotated[int | None, Ge(0)] = None
    """The token at the start of a text, if any; left out: that of the shards."""
    document_attention: bool = False
    """Whether rows read their own document only; the EOS token belongs to the one that it ends."""
    quarantine: Annotated[str | None, Location()] = None
    """JSON file that lists damaged records; data rows of other records replace their data rows."""
    cache_directory: Annotated[str | None, Location()] = None
    """Folder on a local disk for copies of shards that have a URL; left out: a temporary one."""
    cache_gib: Annotated[float, Gt(0), Largest(MAX_GIB)] = 100.0
    """Largest total size of these copies, in GiB."""
    prefetch_steps: Annotated[int, Ge(0), Largest(MAX_PREFETCH_STEPS)] = 2
    """Steps that a thread reads ahead; 0: none."""
    batch_check_interval: Annotated[int, Ge(0)] = 100
    """Steps between checks that all ranks of a copy of the model hold the same batch; 0: never."""

    @property
    def train_corpora(self) -> tuple[str, ...]:
        """The training corpora as a list; it has one entry where there is no blend."""
        return (self.train,) if isinstance(self.train, str) else self.train

    @property
    def vocabulary(self) -> Vocabulary:
        """The vocabulary of the shards, which must be open."""
        assert self.vocab_size is not None, "the shards are not open yet"
        assert self.mask_token_id is not None, "the shards are not open yet"
        return Vocabulary(
            size=self.vocab_size,
            mask_token_id=self.mask_token_id,
            bos_token_id=self.bos_token_id,
        )

    @property
    def row_tokens(self) -> int:
        """Tokens of text in a sample, without those of the framing."""
        return self.sequence_length - (2 if self.framing == "bos_eos" else 0)


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """Length, batch and arithmetic of the run."""

    num_steps: Annotated[int, Gt(0)]
    """Optimizer steps of the run."""
    global_batch_size: Annotated[int, Gt(0), Largest(MAX_BATCH)]
    """Samples of a step, over all ranks."""
    micro_batch_size: Annotated[int, Gt(0), Largest(MAX_BATCH)]
    """Samples that a rank processes at once."""
    device: Literal["auto", "cpu"] = "auto"
    """`auto`: the GPUs; the CPU only on a machine without any. `cpu`: the CPU in any case."""
    deterministic: bool = False
    """Bitwise repeatable on GPUs: kernels and NCCL in a fixed order, which is slower."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Arithmetic; bf16 keeps main parameters, gradients and optimizer state in float32."""
    recompute_granularity: Literal["none", "full"] = "none"
    """Activations to recompute in the backward pass: none, or all of a layer."""
    log_interval: Annotated[int, Gt(0)] = 10
    """Steps between lines of the log and of metrics.jsonl."""
    spike_deviations: Annotated[float, Ge(0), Largest(MAX_DEVIATIONS)] = 6.0
    """Deviations above the moving mean of loss or gradient norm that are flagged; 0: none."""
    skip_deviations: Annotated[float, Ge(0), Largest(MAX_DEVIATIONS)] = 0.0
    """Deviations at which the update is skipped; 0: only where it is not finite."""
    max_skipped_in_row: Annotated[int, Ge(0)] = 10
    """Updates skipped in a row after which the run goes back, without their data; 0: never."""
    max_rollbacks: Annotated[int, Ge(0)] = 2
    """Times that the run may go back to a checkpoint; the next time, it fails."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ValidationConfig:
    """Periodic validation."""

    interval: Annotated[int, Ge(0)] = 0
    """Steps between validations; 0: at the start and at the end only."""
    num_samples: Annotated[int, Ge(0)] = 0
    """Samples of a validation; 0: all."""
    micro_batch_size: Annotated[int, Gt(0), Largest(MAX_BATCH)] = DERIVED
    """Samples that a rank validates at once; by default train.micro_batch_size."""
    raw_weights: bool = True
    """With `optimizer.ema_decay`: a second validation, of the weights without the average."""


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimizerConfig:
    """AdamW, its schedule, and the moving average of the weights."""

    learning_rate: Annotated[float, Gt(0), Largest(MAX_RATE)]
    """Peak learning rate."""
    min_learning_rate: Annotated[float, Ge(0), Largest(MAX_RATE)] = 0.0
    """Learning rate at the end of a decay."""
    lr_decay_style: Literal["constant", "cosine", "WSD"] = "constant"
    """After the warm-up: constant, cosine to the last step, or stable then linear decay."""
    lr_warmup_steps: Annotated[int, Ge(0)] = 0
    """Steps of the linear warm-up."""
    lr_wsd_decay_steps: Annotated[int, Ge(0)] = 0
    """Steps of the decay at the end of WSD."""
    adam_beta1: Annotated[float, Interval(ge=0, lt=1)] = 0.9
    """Decay of the mean of the gradient."""
    adam_beta2: Annotated[float, Interval(ge=0, lt=1)] = 0.999
    """Decay of the mean of its square."""
    adam_eps: Annotated[float, Gt(0), Largest(1)] = 1e-8
    """Added to the root of the mean square."""
    weight_decay: Annotated[float, Ge(0), Largest(MAX_RATE)] = 0.0
    """Decoupled weight decay."""
    weight_decay_exclude: Literal["biases_and_norms", "none"] = "biases_and_norms"
    """The parameters without weight decay."""
    clip_grad: Annotated[float, Ge(0), Largest(MAX_NORM)] = 1.0
    """Largest norm of the whole gradient; 0: no clipping."""
    ema_decay: Annotated[float, Interval(ge=0, lt=1)] = 0.0
    """Decay of the moving average of the weights; 0: none is kept."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ParallelConfig:
    """Layout over ranks; those that tensor and pipeline parallelism leave are data-parallel."""

    tensor_model_parallel_size: Annotated[int, Gt(0), Largest(MAX_PARTS)] = 1
    """Ranks that compute each layer together."""
    pipeline_model_parallel_size: Annotated[int, Gt(0), Largest(MAX_PARTS)] = 1
    """Stages of the pipeline."""
    virtual_pipeline_model_parallel_size: Annotated[int | None, Ge(2), Largest(MAX_PARTS)] = None
    """Model chunks per stage of an interleaved pipeline; left out: not interleaved."""
    pipeline_model_parallel_layout: str | None = None
    """Layers of each pipeline part in Megatron-Core's notation, for layers that do not divide."""
    sequence_parallel: bool = False
    """Split norms and dropout over the tensor-parallel ranks by rows."""
    use_distributed_optimizer: bool = False
    """Shard optimizer state over the data-parallel ranks."""
    overlap_grad_reduce: bool = False
    """Reduce gradients during the backward pass."""
    overlap_param_gather: bool = False
    """Gather the distributed optimizer's parameters during the forward pass."""
    overlap_p2p_comm: bool = False
    """Overlap the pipeline's sends with computation; an interleaved pipeline needs it."""
    batch_p2p_comm: bool = True
    """Batch the pipeline's sends and receives; an interleaved pipeline needs it off."""

    @property
    def model_parallel_size(self) -> int:
        """Ranks that hold one copy of the model."""
        return self.tensor_model_parallel_size * self.pipeline_model_parallel_size

    @property
    def row_multiple(self) -> int:
        """The number that must divide the rows of a micro-batch, for sequence parallelism."""
        return self.tensor_model_parallel_size if self.sequence_parallel else 1

    @property
    def num_pipeline_parts(self) -> int:
        """Parts that the pipeline cuts the model into: stages, times chunks where interleaved."""
        return self.pipeline_model_parallel_size * (self.virtual_pipeline_model_parallel_size or 1)

    def count_stage_layers(self, num_layers: int, stage: int) -> int:
        """Count the layers of a pipeline stage, over all its chunks."""
        if self.pipeline_model_parallel_layout is None:
            return num_layers // self.pipeline_model_parallel_size
        parts = self.pipeline_model_parallel_layout.split("|")
        return sum(part.count("t") for part in parts[stage :: self.pipeline_model_parallel_size])


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointConfig:
    """Checkpoints of the run."""

    interval: Annotated[int, Ge(0)] = 0
    """Steps between checkpoints; 0: at the end only."""
    interval_minutes: Annotated[float, Ge(0), Largest(MAX_SECONDS)] = 0.0
    """Minutes between checkpoints, whatever the steps; 0: by steps only."""
    async_save: bool = True
    """Write in the background; training waits only for a copy to host memory."""
    keep_last: Annotated[int, Gt(0)] = 2
    """Newest checkpoints to keep."""
    keep_every: Annotated[int, Ge(0)] = 0
    """Checkpoints at multiples of this many steps are never deleted; 0: none."""
    keep_best: bool = True
    """Keep the checkpoint with the lowest val/nelbo of those saved at a validation."""
    end_margin_minutes: Annotated[float, Ge(0), Largest(MAX_SECONDS)] = 5.0
    """Minutes before the end of a Slurm allocation to save and end the run; 0: on request only."""
    init_from: Annotated[str | None, Location()] = None
    """Run, checkpoint or sampler directory whose weights a new run starts from."""
    init_other_tokenizer: bool = False
    """Accept initial weights that were trained with another tokenizer of the same size."""


@dataclass(frozen=True, kw_only=True, slots=True)
class WatchdogConfig:
    """Deadlines after which a hanging job is ended and the stacks of its ranks are logged."""

    start_seconds: Annotated[float, Ge(0), Largest(MAX_SECONDS)] = 1800.0
    """Deadline to build the model and read the checkpoint; 0 here and below: no deadline."""
    step_seconds: Annotated[float, Ge(0), Largest(MAX_SECONDS)] = 900.0
    """Deadline of a step, the wait for its data included; the first one has start_seconds too."""
    validation_seconds: Annotated[float, Ge(0), Largest(MAX_SECONDS)] = 3600.0
    """Deadline of a validation."""
    checkpoint_seconds: Annotated[float, Ge(0), Largest(MAX_SECONDS)] = 1800.0
    """Deadline of a checkpoint that the run waits for, or goes back to."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    """All settings of a run, one field for each TOML section."""

    run: RunConfig
    objective: ObjectiveConfig = dataclasses.field(default_factory=ObjectiveConfig)
    model: ModelConfig
    data: DataConfig
    train: TrainConfig
    validation: ValidationConfig = dataclasses.field(default_factory=ValidationConfig)
    optimizer: OptimizerConfig
    parallel: ParallelConfig = dataclasses.field(default_factory=ParallelConfig)
    checkpoint: CheckpointConfig = dataclasses.field(default_factory=CheckpointConfig)
    watchdog: WatchdogConfig = dataclasses.field(default_factory=WatchdogConfig)

    def __post_init__(self) -> None:
        """Derive the values that one section takes from another."""
        if self.validation.micro_batch_size is None:
            size = self.train.micro_batch_size
            validation = dataclasses.replace(self.validation, micro_batch_size=size)
            object.__setattr__(self, "validation", validation)

    def get(self, key: str) -> Any:
        """Return the value of `section.name`."""
        section, _, name = key.partition(".")
        return getattr(getattr(self, section), name)


SECTIONS: dict[str, type] = typing.get_type_hints(Config)
"""The dataclass of each section."""

KEYS: dict[str, Key] = {
    key.path: key for name, section in SECTIONS.items() for key in describe_keys(name, section)
}
"""Every key by `section.name`, in the order of the sections."""
