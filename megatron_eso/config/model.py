"""The section `model`: shape, arithmetic and initial weights of the transformer."""

from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Ge, Gt, Interval

from megatron_eso.config.divisibility import round_up
from megatron_eso.config.keys import DERIVED, Frozen, Largest, Logged

MAX_LAYERS = 10_000
MAX_WIDTH = 2**24
"""More than any machine holds, and small enough that no check overflows."""
MAX_STD = 1000
MAX_ROPE = 2**24
SWIGLU_MULTIPLE = 64
"""A SwiGLU's derived width, 8/3 of the hidden size, is rounded up to a multiple of this."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """The transformer."""

    num_layers: Annotated[int, Gt(0), Largest(MAX_LAYERS), Frozen()]
    """Transformer layers."""
    hidden_size: Annotated[int, Gt(0), Largest(MAX_WIDTH), Frozen()]
    """Width of the residual stream."""
    num_attention_heads: Annotated[int, Gt(0), Largest(MAX_WIDTH), Frozen()]
    """Query heads."""
    kv_channels: Annotated[int, Gt(0), Largest(MAX_WIDTH), Frozen()] = DERIVED
    """Channels of a head; by default hidden_size / num_attention_heads."""
    num_query_groups: Annotated[int, Gt(0), Largest(MAX_WIDTH), Frozen()] = DERIVED
    """Key and value heads; by default num_attention_heads."""
    ffn_hidden_size: Annotated[int, Gt(0), Largest(MAX_WIDTH), Frozen()] = DERIVED
    """Width of the MLP; by default 4 hidden_size, for SwiGLU 8/3 of it, up to a multiple of 64."""
    normalization: Annotated[Literal["LayerNorm", "RMSNorm"], Frozen()] = "LayerNorm"
    """Norm before each branch and before the head; LayerNorm has a bias."""
    norm_epsilon: Annotated[float, Gt(0), Largest(1), Frozen()] = 1e-5
    """Added to the variance."""
    activation: Annotated[Literal["gelu", "swiglu"], Frozen()] = "gelu"
    """Activation of the MLP; GELU in its tanh approximation."""
    rotary_base: Annotated[int, Gt(0), Frozen("run"), Logged()] = 10000
    """Base of the rotary position embedding."""
    rope_scaling: Annotated[bool, Frozen("run"), Logged()] = False
    """Slow the low rotary frequencies down, as Llama 3.1 does for longer texts."""
    rope_scaling_factor: Annotated[float, Ge(1), Largest(MAX_ROPE), Frozen("run"), Logged()] = 8.0
    """What rope_scaling divides the lowest frequencies by."""
    rope_low_freq_factor: Annotated[float, Gt(0), Largest(MAX_ROPE), Frozen("run"), Logged()] = 1.0
    """rope_scaling divides frequencies of at most this many turns in the original length."""
    rope_high_freq_factor: Annotated[float, Gt(0), Largest(MAX_ROPE), Frozen("run"), Logged()] = 4.0
    """rope_scaling keeps frequencies of at least this many turns in the original length."""
    rope_original_length: Annotated[int, Gt(0), Largest(MAX_ROPE), Frozen("run"), Logged()] = 8192
    """The original length: positions of a text before rope_scaling."""
    qk_layernorm: Annotated[bool, Frozen()] = False
    """Normalise queries and keys per head."""
    add_bias_linear: Annotated[bool, Frozen()] = True
    """Biases of the layers' linear maps."""
    add_qkv_bias: Annotated[bool, Frozen()] = False
    """Biases of queries, keys and values alone, without add_bias_linear."""
    share_embeddings_and_output_weights: Annotated[bool, Frozen()] = False
    """Tie the head to the embedding."""
    head_bias: Annotated[bool, Frozen()] = False
    """Bias of the head."""
    residual_gates: Annotated[bool, Frozen()] = False
    """A per-channel gate on each residual branch, zero at the start, folded away at export."""
    zero_init_head: Annotated[bool, Logged()] = False
    """Start with a head of zeros, that is from the uniform distribution."""
    hidden_dropout: Annotated[float, Interval(ge=0, lt=1), Logged()] = 0.0
    """Dropout on each residual branch."""
    init_method_std: Annotated[float, Gt(0), Largest(MAX_STD), Logged()] = 0.02
    """Standard deviation of the initial weights."""
    fp32_residual_connection: Annotated[bool, Logged()] = True
    """Keep the residual stream in float32 under bf16."""
    make_vocab_size_divisible_by: Annotated[int, Gt(0), Largest(MAX_WIDTH), Frozen()] = 128
    """The vocabulary is padded to a multiple of this, whatever the tensor parallelism."""

    def __post_init__(self) -> None:
        """Derive the widths that are left out."""
        heads = self.num_attention_heads
        if self.num_query_groups is None:
            object.__setattr__(self, "num_query_groups", heads)
        # Heads that do not divide the hidden size have no width; `check_config` refuses them.
        if self.kv_channels is None and heads > 0 and self.hidden_size % heads == 0:
            object.__setattr__(self, "kv_channels", self.hidden_size // heads)
        if self.ffn_hidden_size is None:
            width = 4 * self.hidden_size
            if self.activation == "swiglu":
                width = round_up(-(-8 * self.hidden_size // 3), SWIGLU_MULTIPLE)
            object.__setattr__(self, "ffn_hidden_size", width)

    @property
    def query_size(self) -> int:
        """Channels of all query heads."""
        return self.num_attention_heads * self.kv_channels

    @property
    def has_qkv_bias(self) -> bool:
        """Whether queries, keys and values have a bias."""
        return self.add_bias_linear or self.add_qkv_bias

    def pad_vocabulary(self, vocab_size: int) -> int:
        """Return the rows of embedding and head for a vocabulary of `vocab_size` tokens."""
        return round_up(vocab_size, self.make_vocab_size_divisible_by)
