"""The configuration: one frozen dataclass per TOML section, every value resolved.

Keys bear Megatron-Core's names or the Eso-LM paper's (arXiv 2506.01928). A value that depends on
others where the user leaves it out (`DERIVED`) is filled in when its section, or for
`validation.micro_batch_size` the whole, is built: a `Config` never holds an open choice. What
values may stand together is checked by `config_checks.py`; files are read by `config_io.py`.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

FORMAT_VERSION = 1

DERIVED: Any = None
"""Default of a value that follows from others; `dataclasses.replace` keeps what was derived."""

SWIGLU_MULTIPLE = 64
"""A SwiGLU's derived width, 8/3 of the hidden size, is rounded up to a multiple of this."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Vocabulary:
    """The token ids of a run."""

    size: int
    """Ids of the tokenizer, the mask token among them; a model pads its embedding beyond."""
    mask_token_id: int
    """The mask token; it never occurs in a text and is never predicted."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RunConfig:
    """Where the run lives and what it draws its randomness from."""

    directory: str
    """Run directory: logs, metrics and checkpoints; a run resumes from what it finds there."""
    seed: int = 1
    """Key of everything random: sample order, noise, initial weights, dropout."""
    wandb_project: str | None = None
    """Project of Weights & Biases to send the curves to as well; left out: none."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ObjectiveConfig:
    """The training objective."""

    name: str = "eso_lm"
    """Objective; `eso_lm` so far."""
    variant: str = "b"
    """Eso-LM variant: `b` (causal over slots) so far."""
    alpha_0: float = 0.125
    """Share of tokens that the diffusion phase reveals: 1 is pure diffusion, 0 pure AR."""
    batch_split: float = DERIVED
    """Share of the samples that train the diffusion phase; 1 at alpha_0=1, 0 at 0, else 0.5."""
    loss_type: Literal["elbo", "low_var"] = "elbo"
    """Weight of a masked token in the diffusion phase: of the bound, or 1."""
    sampling_eps: float = 1e-3
    """Diffusion times are drawn from [sampling_eps, 1]."""

    def __post_init__(self) -> None:
        """Derive the split from the edges of alpha_0, where a phase is empty."""
        if self.batch_split is None:
            split = self.alpha_0 if self.alpha_0 in (0, 1) else 0.5
            object.__setattr__(self, "batch_split", float(split))


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """The transformer."""

    num_layers: int
    """Transformer layers."""
    hidden_size: int
    """Width of the residual stream."""
    num_attention_heads: int
    """Query heads; a head has hidden_size / num_attention_heads channels."""
    num_query_groups: int = DERIVED
    """Key and value heads; num_attention_heads."""
    ffn_hidden_size: int = DERIVED
    """Width of the MLP; 4 hidden_size, or for SwiGLU 8/3 of it rounded up to a multiple of 64."""
    normalization: Literal["LayerNorm", "RMSNorm"] = "LayerNorm"
    """Norm before each branch and before the head; LayerNorm has a bias."""
    norm_epsilon: float = 1e-5
    """Added to the variance."""
    activation: Literal["gelu", "swiglu"] = "gelu"
    """Activation of the MLP; GELU in its tanh approximation."""
    rotary_base: int = 10000
    """Base of the rotary position embedding."""
    qk_layernorm: bool = False
    """Normalise queries and keys per head."""
    add_bias_linear: bool = True
    """Biases of the layers' linear maps."""
    share_embeddings_and_output_weights: bool = False
    """Tie the head to the embedding."""
    head_bias: bool = False
    """Bias of the head."""
    residual_gates: bool = False
    """A per-channel gate on each residual branch, zero at the start, folded away at export."""
    zero_init_head: bool = False
    """Start with a head of zeros, that is from the uniform distribution."""
    hidden_dropout: float = 0.0
    """Dropout on each residual branch."""
    init_method_std: float = 0.02
    """Standard deviation of the initial weights."""
    fp32_residual_connection: bool = True
    """Keep the residual stream in float32 under bf16."""
    make_vocab_size_divisible_by: int = 128
    """The vocabulary is padded to a multiple of this, whatever the tensor parallelism."""

    def __post_init__(self) -> None:
        """Derive widths."""
        if self.num_query_groups is None:
            object.__setattr__(self, "num_query_groups", self.num_attention_heads)
        if self.ffn_hidden_size is None:
            width = 4 * self.hidden_size
            if self.activation == "swiglu":
                width = round_up(-(-8 * self.hidden_size // 3), SWIGLU_MULTIPLE)
            object.__setattr__(self, "ffn_hidden_size", width)

    @property
    def head_dim(self) -> int:
        """Channels of a head."""
        return self.hidden_size // self.num_attention_heads

    def pad_vocabulary(self, vocab_size: int) -> int:
        """Rows of the embedding and of the head for a vocabulary of `vocab_size` tokens."""
        return round_up(vocab_size, self.make_vocab_size_divisible_by)


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    """Token shards."""

    train: str | tuple[str, ...]
    """Directory or URL of the training shards, or a list of them: a blend of corpora."""
    train_weights: tuple[float, ...] | None = None
    """Shares of the corpora in the samples, in any unit; left out: by their numbers of rows."""
    phase: int = 1
    """Number of the blend within the run: raise it by one to change the blend on resume."""
    validation: str | None = None
    """Directory or URL of the validation shards."""
    sequence_length: int
    """Tokens of a sample."""
    framing: Literal["none", "bos_eos"] = "none"
    """`bos_eos`: BOS first and EOS last in every sample, in place of two tokens of text."""
    ssl_ratio: float = 0.0
    """Share of the training samples that are cut to a random length."""
    vocab_size: int | None = None
    """Tokens of the vocabulary, the mask token among them; the shards tell."""
    mask_token_id: int | None = None
    """The mask token; the shards tell."""
    quarantine: str | None = None
    """JSON file that lists damaged records; rows of other records stand in for theirs."""
    cache_directory: str | None = None
    """Folder on a local disk for copies of shards that have a URL; left out: a temporary one."""
    cache_gib: float = 100.0
    """Largest size of these copies together, in GiB."""
    prefetch_steps: int = 2
    """Steps that a thread reads ahead; 0: none."""
    batch_check_interval: int = 100
    """Steps between checks that all ranks of a copy of the model hold the same batch; 0: never."""

    @property
    def train_corpora(self) -> tuple[str, ...]:
        """The training shards as a list, of one where there is no blend."""
        return (self.train,) if isinstance(self.train, str) else self.train

    @property
    def vocabulary(self) -> Vocabulary:
        """The vocabulary of the shards, once they are open."""
        assert self.vocab_size is not None, "the shards are not open yet"
        assert self.mask_token_id is not None, "the shards are not open yet"
        return Vocabulary(size=self.vocab_size, mask_token_id=self.mask_token_id)

    @property
    def row_tokens(self) -> int:
        """Tokens of text in a sample: what its framing leaves."""
        return self.sequence_length - (2 if self.framing == "bos_eos" else 0)


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """Length, batch and arithmetic of the run."""

    num_steps: int
    """Optimizer steps of the run."""
    global_batch_size: int
    """Samples of a step, over all ranks."""
    micro_batch_size: int
    """Samples that a rank processes at once."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Arithmetic; bf16 keeps main parameters, gradients and optimizer state in float32."""
    recompute_granularity: Literal["none", "full"] = "none"
    """Activations to recompute in the backward pass: none, or all of a layer."""
    log_interval: int = 10
    """Steps between lines of the log and of metrics.jsonl."""
    spike_deviations: float = 6.0
    """Deviations above the moving mean of loss or gradient norm that are flagged; 0: none."""
    skip_deviations: float = 0.0
    """Deviations at which the update is left out; 0: only where it is not finite."""
    max_skipped_in_row: int = 10
    """Updates left out in a row after which to go back to a checkpoint, past the data; 0: never."""
    max_rollbacks: int = 2
    """Times to go back; then the run fails."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ValidationConfig:
    """Periodic validation."""

    interval: int = 0
    """Steps between validations; 0: at the start and at the end only."""
    num_samples: int = 0
    """Samples of a validation; 0: all."""
    micro_batch_size: int = DERIVED
    """Samples that a rank validates at once; train.micro_batch_size."""


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimizerConfig:
    """AdamW, its schedule, and the moving average of the weights."""

    learning_rate: float
    """Peak learning rate."""
    min_learning_rate: float = 0.0
    """Learning rate at the end of a decay."""
    lr_decay_style: Literal["constant", "cosine", "WSD"] = "constant"
    """After the warm-up: constant, cosine to the last step, or stable then linear decay."""
    lr_warmup_steps: int = 0
    """Steps of the linear warm-up."""
    lr_wsd_decay_steps: int = 0
    """Steps of the decay at the end of WSD."""
    adam_beta1: float = 0.9
    """Decay of the mean of the gradient."""
    adam_beta2: float = 0.999
    """Decay of the mean of its square."""
    adam_eps: float = 1e-8
    """Added to the root of the mean square."""
    weight_decay: float = 0.0
    """Decoupled weight decay."""
    weight_decay_exclude: Literal["biases_and_norms", "none"] = "biases_and_norms"
    """What weight decay spares."""
    clip_grad: float = 1.0
    """Largest norm of the whole gradient; 0: no clipping."""
    ema_decay: float = 0.0
    """Decay of the moving average of the weights; 0: none is kept."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ParallelConfig:
    """Layout over ranks; data parallelism takes what tensor and pipeline parallelism leave."""

    tensor_model_parallel_size: int = 1
    """Ranks that share each layer."""
    pipeline_model_parallel_size: int = 1
    """Stages of the pipeline."""
    virtual_pipeline_model_parallel_size: int | None = None
    """Model chunks per stage of an interleaved pipeline; left out: not interleaved."""
    pipeline_model_parallel_layout: str | None = None
    """Layers of each pipeline part in Megatron-Core's notation, where they do not divide evenly."""
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
    def num_pipeline_parts(self) -> int:
        """Parts that the pipeline cuts the model into: stages, times chunks where interleaved."""
        return self.pipeline_model_parallel_size * (self.virtual_pipeline_model_parallel_size or 1)

    def count_stage_layers(self, num_layers: int, stage: int) -> int:
        """Layers on the ranks of a pipeline stage, all chunks together."""
        if self.pipeline_model_parallel_layout is None:
            return num_layers // self.pipeline_model_parallel_size
        parts = self.pipeline_model_parallel_layout.split("|")
        return sum(part.count("t") for part in parts[stage :: self.pipeline_model_parallel_size])


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointConfig:
    """Checkpoints of the run."""

    interval: int = 0
    """Steps between checkpoints; 0: at the end only."""
    interval_minutes: float = 0.0
    """Minutes between checkpoints, whatever the steps; 0: by steps only."""
    async_save: bool = True
    """Write beside the training, which waits for a copy to host memory only."""
    keep_last: int = 2
    """Newest checkpoints to keep."""
    keep_every: int = 0
    """Checkpoints at multiples of this many steps are kept for ever; 0: none."""
    keep_best: bool = True
    """Keep the checkpoint of the lowest val/nelbo, among those saved at a validation."""
    end_margin_minutes: float = 5.0
    """Minutes before the end of a Slurm allocation to save and leave; 0: only when told to."""
    init_from: str | None = None
    """Run, checkpoint or sampler directory whose weights a new run starts from."""
    init_other_tokenizer: bool = False
    """Start from these weights although they were trained with another tokenizer of equal size."""


@dataclass(frozen=True, kw_only=True, slots=True)
class WatchdogConfig:
    """Deadlines after which a job that hangs is ended, with the stacks of its ranks in the log."""

    start_seconds: float = 1800.0
    """For building the model and reading the checkpoint; 0 here and below: no deadline."""
    step_seconds: float = 900.0
    """For a training step, waiting for its data included; the first one has start_seconds too."""
    validation_seconds: float = 3600.0
    """For a validation."""
    checkpoint_seconds: float = 1800.0
    """For a checkpoint that the run waits for, or goes back to."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    """All of a run's settings, a field per TOML section."""

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
        """Derive what one section takes from another."""
        if self.validation.micro_batch_size is None:
            size = self.train.micro_batch_size
            validation = dataclasses.replace(self.validation, micro_batch_size=size)
            object.__setattr__(self, "validation", validation)


def round_up(number: int, multiple: int) -> int:
    """The smallest multiple of `multiple` that is no less than `number`."""
    return -(-number // multiple) * multiple
