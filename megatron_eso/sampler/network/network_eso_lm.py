"""The Eso-LM network of variant B in plain torch: a pre-LN causal transformer over slots.

The package imports this file and `layers_eso_lm.py`; a sampler directory holds a copy of both, with
`modeling_eso_lm.py`. So they import torch and each other only. Paper: arXiv 2506.01928.

Shape suffixes: B samples, T slots, M queries, R rows of a forward pass, K keys, V vocabulary,
C width of the model, E rows given to the head.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .layers_eso_lm import (
    Head,
    KeyValueStore,
    Layer,
    NetworkConfig,
    build_norm,
    residual_dtype,
    rotary_tables,
)


class EsoNetworkMixin:
    """The network and the logits of its two phases, for a subclass that is an `nn.Module`."""

    network_config: NetworkConfig
    embed_tokens: nn.Embedding
    layers: nn.ModuleList
    norm: nn.Module
    lm_head: Head

    def build_network(self, config: NetworkConfig) -> None:
        """Create the modules."""
        self.network_config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config, i) for i in range(config.num_hidden_layers))
        self.norm = build_norm(config, config.hidden_size)
        self.lm_head = Head(config)

    def hidden_states(
        self,
        tokens_BR: Tensor,
        positions_BR: Tensor,
        is_visible_BRK: Tensor | None = None,
        cache: KeyValueStore | None = None,
    ) -> Tensor:
        """Compute the normed output of the last layer for each row, `[B, R, C]`.

        Args:
            tokens_BR: Tokens of the rows, int64.
            positions_BR: Positions of the rows in the text, int64, for the rotary angles.
            is_visible_BRK: Which keys each row reads, bool; None: causal over the rows.
            cache: Stores the rows' keys and values, and adds those of earlier passes.
        """
        rotary = rotary_tables(self.network_config, positions_BR)
        embedded_BRC: Tensor = self.embed_tokens(tokens_BR)
        x_BRC = embedded_BRC.to(residual_dtype(embedded_BRC.dtype))
        for layer in self.layers:
            x_BRC = layer(x_BRC, rotary, is_visible_BRK, cache)
        normed_BRC: Tensor = self.norm(x_BRC)
        return normed_BRC

    def logits(self, x_EC: Tensor) -> Tensor:
        """Compute the logits `[..., V]` of normed rows `[..., C]`."""
        logits: Tensor = self.lm_head(x_EC, self.embed_tokens.weight)
        return logits

    def diffusion_logits(self, z_t: Tensor, permutation: Tensor) -> Tensor:
        """Compute the logits of the diffusion phase, causal over slots.

        Args:
            z_t: Text in natural order, int64 `[B, T]`, with the mask token where unknown.
            permutation: Order of the slots, int64 `[B, T]`: `permutation[b, slot] = position`.

        Returns:
            Logits in slot order, `[B, T, V]`; the mask token's column is not masked.

        Raises:
            ValueError: A masked token comes before a clean one in slot order, `T > max_length`, or
                a shape, dtype or token is wrong.
        """
        self._check(permutation, z_t=z_t)
        z_BT = z_t.gather(1, permutation)
        _check_clean_first(z_BT == self.network_config.mask_token_id)
        return self.logits(self.hidden_states(z_BT, permutation))

    def sequential_logits(self, z_0: Tensor, x_0: Tensor, permutation: Tensor) -> Tensor:
        """Compute the logits of the sequential phase: a masked slot reads the slots before it.

        The rows are a causal stream of the clean text, and one query per masked slot, which reads
        the stream strictly before its slot, and itself. The result equals that of the paper's
        `2T x 2T` mask on `z_0` and `x_0`, which has further rows that no other row reads.

        Args:
            z_0: Text in natural order, int64 `[B, T]`, with the mask token where it is predicted.
            x_0: The clean text in natural order, int64 `[B, T]`.
            permutation: Order of the slots, int64 `[B, T]`: `permutation[b, slot] = position`.

        Returns:
            Logits in slot order, `[B, T, V]`, with zeros at clean slots.

        Raises:
            ValueError: As `diffusion_logits`, or `z_0` and `x_0` differ at a clean position.
        """
        self._check(permutation, z_0=z_0, x_0=x_0)
        mask_token_id = self.network_config.mask_token_id
        if bool(((z_0 != mask_token_id) & (z_0 != x_0)).any()):
            raise ValueError("z_0 and x_0 differ at a position that z_0 does not mask")
        is_masked_BT = z_0.gather(1, permutation) == mask_token_id
        _check_clean_first(is_masked_BT)
        num_slots = permutation.shape[1]
        num_queries = int(is_masked_BT.sum(1).max())
        logits_BMV = self._query_logits(x_0.gather(1, permutation), permutation, num_queries)
        logits_BMV = logits_BMV * is_masked_BT[:, num_slots - num_queries :, None]
        return F.pad(logits_BMV, (0, 0, num_slots - num_queries, 0))

    def _query_logits(self, x_BT: Tensor, permutation_BT: Tensor, num_queries: int) -> Tensor:
        """Compute the logits `[B, M, V]` of queries at the last M slots."""
        num_slots = x_BT.shape[1]
        query_positions_BM = permutation_BT[:, num_slots - num_queries :]
        queries_BM = torch.full_like(query_positions_BM, self.network_config.mask_token_id)
        slots_T = torch.arange(num_slots, device=x_BT.device)
        query_slots_M = slots_T[num_slots - num_queries :]
        row_slots_R = torch.cat([slots_T, query_slots_M])
        is_query_R = torch.arange(num_slots + num_queries, device=x_BT.device) >= num_slots
        # A clean row reads the clean rows up to its slot; a query those before it, and itself.
        last_R = row_slots_R - is_query_R.to(torch.int64)
        is_visible_RT = slots_T[None] <= last_R[:, None]
        is_visible_RM = is_query_R[:, None] & (query_slots_M[None] == row_slots_R[:, None])
        is_visible_RR = torch.cat([is_visible_RT, is_visible_RM], dim=1)
        hidden_BRC = self.hidden_states(
            torch.cat([x_BT, queries_BM], dim=1),
            torch.cat([permutation_BT, query_positions_BM], dim=1),
            is_visible_RR[None],
        )
        return self.logits(hidden_BRC[:, num_slots:])

    def _check(self, permutation: Tensor, **tokens: Tensor) -> None:
        """Check shapes, dtypes and values.

        Raises:
            ValueError: A tensor is not int64 `[B, T]` with the values that it may have.
        """
        num_slots = permutation.shape[-1]
        for name, tensor in {"permutation": permutation, **tokens}.items():
            if tensor.dim() != 2 or tensor.shape != permutation.shape:
                raise ValueError(
                    f"{name} has the shape {list(tensor.shape)}, not [B, T] as permutation's "
                    f"{list(permutation.shape)}"
                )
            if tensor.dtype != torch.int64:
                raise ValueError(f"{name} is {tensor.dtype}, not torch.int64")
        if num_slots > self.network_config.max_length:
            raise ValueError(
                f"T = {num_slots} is more than max_length = {self.network_config.max_length}"
            )
        check_permutation(permutation)
        for name, tensor in tokens.items():
            check_tokens(name, tensor, self.network_config.vocab_size)


def check_permutation(permutation_BT: Tensor) -> None:
    """Check a batch of permutations, int64 `[B, T]`.

    Raises:
        ValueError: One of them does not hold each of the positions 0..T-1 once.
    """
    positions_T = torch.arange(permutation_BT.shape[1], device=permutation_BT.device)
    if not bool((permutation_BT.sort(dim=1).values == positions_T).all()):
        raise ValueError("permutation does not hold each of the positions 0..T-1 once")


def check_tokens(name: str, tokens: Tensor, vocab_size: int) -> None:
    """Check tokens of any shape.

    Raises:
        ValueError: A token is not in the vocabulary.
    """
    if bool(((tokens < 0) | (tokens >= vocab_size)).any()):
        raise ValueError(f"{name} has a token outside 0..{vocab_size - 1}")


def _check_clean_first(is_masked_BT: Tensor) -> None:
    if bool((is_masked_BT[:, :-1] & ~is_masked_BT[:, 1:]).any()):
        raise ValueError("a masked token comes before a clean one in slot order")


class EsoNetwork(EsoNetworkMixin, nn.Module):
    """The network as a module, whose state dict has the names of `model.safetensors`."""

    def __init__(self, config: NetworkConfig) -> None:
        """Build the network with torch's random weights and a head of zeros."""
        super().__init__()
        self.build_network(config)
