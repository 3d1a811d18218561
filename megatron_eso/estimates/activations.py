"""Bytes that forward passes keep for the backward pass, and what is alive at the peak.

The counts are those of the tensors that autograd keeps for this model's own layers under torch's
attention. `tests/simulation/dry_run_memory.py` holds the sums to the simulator.

Symbols: R rows, E loss rows, D hidden size, F width of the MLP, V vocabulary; a row of a tensor of
width D in the compute type takes `c * D` bytes, c = 2 for bf16.
"""

from dataclasses import dataclass

from megatron_eso.config.sections import Config

FLOAT32_BYTES = 4
COMPUTE_BYTES = {"fp32": 4, "bf16": 2}


@dataclass(frozen=True, slots=True)
class RowBytes:
    """Bytes of one row on one rank, by what of a layer keeps them.

    Attributes:
        stream: The residual stream between layers.
        norm: Input and output of a norm.
        keys: Packed queries, keys and values, and the rotated keys: of all rows in every layer.
        queries: Rotated queries, attention output and its copy in the order of the rows.
        branch: What a residual branch keeps of its output: for the gate and for dropout.
        mlp: Input and output of the MLP's activation function.
        rotary: Table of the rotary angles, once for all layers.
        logit: A logit on this rank, its float32 copy, and a copy of that with masked entries.
        output: Attention output in float32.
        key: Keys in float32.
        gradient: Gradient of a branch's output, gathered from all ranks.
        activation: Gradient of the MLP's activations.
        weight: Gradient of the weights of a linear map of the MLP, whatever the rows.
    """

    stream: float
    norm: float
    keys: float
    queries: float
    branch: float
    mlp: float
    rotary: float
    logit: float
    output: float
    key: float
    gradient: float
    activation: float
    weight: float

    @classmethod
    def of(cls, config: Config) -> "RowBytes":
        """Count the bytes of a configuration's layers."""
        model, parallel = config.model, config.parallel
        compute = COMPUTE_BYTES[config.train.precision]
        ranks = parallel.tensor_model_parallel_size
        hidden = model.hidden_size / parallel.row_multiple
        query = model.query_size * compute / ranks
        key = model.num_query_groups * model.kv_channels * compute / ranks
        # Norms over heads keep their input in float32, which bf16 has to be copied to.
        upcast = FLOAT32_BYTES / compute if compute < FLOAT32_BYTES else 0.0
        qk_norm = upcast * (query + key) if model.qk_layernorm else 0.0
        # SwiGLU: both inputs packed, the second one again, and the factor.
        widths = 5 if model.activation == "swiglu" else 2
        return cls(
            stream=hidden * (FLOAT32_BYTES if model.fp32_residual_connection else compute),
            norm=hidden * (FLOAT32_BYTES + compute),
            keys=query + 3 * key + qk_norm,
            queries=3 * query,
            branch=hidden * (compute * model.residual_gates + (model.hidden_dropout > 0)),
            mlp=widths * model.ffn_hidden_size * compute / ranks,
            rotary=model.kv_channels * FLOAT32_BYTES,
            logit=(compute * (compute < FLOAT32_BYTES) + 2 * FLOAT32_BYTES) / ranks,
            output=query / compute * FLOAT32_BYTES,
            key=key / compute * FLOAT32_BYTES,
            gradient=model.hidden_size * compute,
            activation=model.ffn_hidden_size * compute / ranks,
            weight=model.ffn_hidden_size * model.hidden_size * compute / ranks,
        )

    @property
    def layer(self) -> float:
        """A row of a layer that keeps all rows."""
        return 2 * (self.norm + self.branch) + self.keys + self.queries + self.mlp

    def count_mlp_backward(self, rows: int) -> float:
        """Return what is alive besides a layer's own bytes where its backward pass begins.

        These are the gradients of the residual stream, of the branch's output and of the MLP's
        activations, and that of the weights.
        """
        return rows * (self.stream + self.gradient + self.activation) + self.weight

    def count_attention_backward(self, rows: int, queries: int, keys: int) -> float:
        """Return the same in the backward pass of strict attention.

        It keeps copies in float32: of queries and their output four, of their own keys and values
        and of the stream's four each. What the layer kept after its attention is gone by then.
        """
        copies = queries * (5 * self.output + 4 * self.key) + keys * 4 * self.key
        casts = (queries * (self.output + 2 * self.key) + keys * 2 * self.key) / 2
        gone = self.queries / 3 + self.norm + 2 * self.branch + self.mlp
        return copies + casts + rows * (self.stream - gone)

    @property
    def last_row(self) -> float:
        """A row of the last layer, whether it carries loss or not."""
        return self.norm + self.keys

    @property
    def last_loss_row(self) -> float:
        """A loss row of the last layer, with the final norm."""
        return self.queries + 2 * (self.norm + self.branch) + self.mlp
