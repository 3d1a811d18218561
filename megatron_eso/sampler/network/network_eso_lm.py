"""The network in plain torch, a pre-LN transformer, and the logits of each objective.

The package imports this file, `layers_eso_lm.py` and `masks_eso_lm.py`; a sampler directory holds a
copy of them, with `modeling_eso_lm.py`. So they import torch and each other only. Paper: arXiv
2506.01928.

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
from .masks_eso_lm import block_stream_mask, query_mask, set_mask, slot_mask


class EsoNetworkMixin:
    """The network and the logits of each objective, for a subclass that is an `nn.Module`."""

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

    def diffusion_logits(
        self, z_t: Tensor, permutation: Tensor, *, two_way_prefix: bool = False
    ) -> Tensor:
        """Compute the logits of the diffusion phase, causal over slots.

        Args:
            z_t: Text in natural order, int64 `[B, T]`, with the mask token where unknown.
            permutation: Order of the slots, int64 `[B, T]`: `permutation[b, slot] = position`.
            two_way_prefix: Whether the clean slots read each other both ways (variant A).

        Returns:
            Logits in slot order, `[B, T, V]`; the mask token's column is not masked.

        Raises:
            ValueError: A masked token comes before a clean one in slot order, `T > max_length`, or
                a shape, dtype or token is wrong.
        """
        z_BT, is_masked_BT = self._sort(permutation, z_t=z_t)
        is_visible_BTT = None
        if two_way_prefix:
            slots_1T = _range_like(z_BT)[None]
            clean_B = (~is_masked_BT).sum(1)
            is_visible_BTT = slot_mask(slots_1T, z_BT.shape[1], clean_B)
        return self.logits(self.hidden_states(z_BT, permutation, is_visible_BTT))

    def set_logits(self, z_t: Tensor, permutation: Tensor) -> Tensor:
        """Compute logits where each masked slot reads the clean slots and itself.

        Arguments, result and errors are those of `diffusion_logits`. The row of the first masked
        slot equals that of `sequential_logits`.
        """
        z_BT, is_masked_BT = self._sort(permutation, z_t=z_t)
        slots_BT = _range_like(z_BT).expand_as(z_BT)
        is_visible_BTT = set_mask(slots_BT, z_BT.shape[1], (~is_masked_BT).sum(1))
        return self.logits(self.hidden_states(z_BT, permutation, is_visible_BTT))

    def sequential_logits(
        self,
        z_0: Tensor,
        x_0: Tensor,
        permutation: Tensor,
        *,
        two_way_prefix: bool = False,
        predicts_next: bool = False,
    ) -> Tensor:
        """Compute the logits of the sequential phase: a masked slot reads the slots before it.

        The rows are a causal stream of the clean text, and one query per masked slot, which reads
        the stream strictly before its slot, and itself. The result equals that of the paper's
        `2T x 2T` mask on `z_0` and `x_0`, which has further rows that no other row reads.

        Args:
            z_0: Text in natural order, int64 `[B, T]`, with the mask token where it is predicted.
            x_0: The clean text in natural order, int64 `[B, T]`.
            permutation: Order of the slots, int64 `[B, T]`: `permutation[b, slot] = position`.
            two_way_prefix: Whether the slots that `z_0` leaves clean read each other both ways
                (variant A).
            predicts_next: Whether the row of the slot before predicts a masked slot where it has
                the token before it in the text (`find_next`).

        Returns:
            Logits in slot order, `[B, T, V]`, with zeros at clean slots.

        Raises:
            ValueError: As `diffusion_logits`, or `z_0` and `x_0` differ at a clean position.
        """
        _, is_masked_BT = self._sort(permutation, z_0=z_0, x_0=x_0)
        if bool(((z_0 != self.network_config.mask_token_id) & (z_0 != x_0)).any()):
            raise ValueError("z_0 and x_0 differ at a position that z_0 does not mask")
        first = permutation.shape[1] - int(is_masked_BT.sum(1).max())
        prefix_B = (~is_masked_BT).sum(1) if two_way_prefix else None
        x_BT = x_0.gather(1, permutation)
        clean_BTC, queries_BMC = self._compute_queries(x_BT, permutation, first, prefix_B)
        if predicts_next:
            before_BMC = F.pad(clean_BTC[:, :-1], (0, 0, 1, 0))[:, first:]
            is_next_BM1 = find_next(permutation)[:, first:, None]
            queries_BMC = torch.where(is_next_BM1, before_BMC, queries_BMC)
        logits_BMV = self.logits(queries_BMC) * is_masked_BT[:, first:, None]
        return F.pad(logits_BMV, (0, 0, first, 0))

    def two_way_logits(self, z_t: Tensor) -> Tensor:
        """Compute the logits of MDLM: every position reads all positions.

        Args:
            z_t: Text in natural order, int64 `[B, T]`, with the mask token where unknown.

        Returns:
            Logits in natural order, `[B, T, V]`; the mask token's column is not masked.

        Raises:
            ValueError: `T > max_length`, or a shape, dtype or token is wrong.
        """
        self._check(z_t=z_t)
        everything = torch.ones(1, *[z_t.shape[1]] * 2, dtype=torch.bool, device=z_t.device)
        return self.logits(self.hidden_states(z_t, _range_like(z_t).expand_as(z_t), everything))

    def next_token_logits(self, tokens: Tensor, prepended: int | None) -> Tensor:
        """Compute the logits of AR: each row reads the rows up to its own.

        Args:
            tokens: Text in natural order, int64 `[B, T]`.
            prepended: Token of a row before the text; the text then has the rows 1 .. T. None: the
                text has the rows 0 .. T-1. The number of a row is its position for the rotary
                angles.

        Returns:
            `[B, T + 1, V]`, of which row i predicts token i; or without a prepended token
            `[B, T, V]`, of which row i predicts token i + 1. The mask token's column is not masked.

        Raises:
            ValueError: `T > max_length`, or a shape, dtype or token is wrong.
        """
        self._check(tokens=tokens)
        if prepended is not None:
            tokens = F.pad(tokens, (1, 0), value=prepended)
        return self.logits(self.hidden_states(tokens, _range_like(tokens).expand_as(tokens)))

    def block_logits(self, z_t: Tensor, x_0: Tensor, block_size: int) -> Tensor:
        """Compute the logits of block diffusion for all blocks at once.

        The rows are the clean text without its last block, and the masked text; see
        `block_stream_mask`.

        Args:
            z_t: Text in natural order, int64 `[B, T]`, with the mask token where unknown.
            x_0: The clean text in natural order, int64 `[B, T]`.
            block_size: Number of positions in a block; the last block may have fewer.

        Returns:
            Logits of the masked text in natural order, `[B, T, V]`; the mask token's column is not
            masked.

        Raises:
            ValueError: `block_size < 1`, `T > max_length`, or a shape, dtype or token is wrong.
        """
        self._check(z_t=z_t, x_0=x_0)
        if block_size < 1:
            raise ValueError(f"block_size is {block_size}, not a whole number from 1")
        positions_T = _range_like(z_t)
        num_clean = (z_t.shape[1] - 1) // block_size * block_size
        positions_R = torch.cat([positions_T[:num_clean], positions_T])
        hidden_BRC = self.hidden_states(
            torch.cat([x_0[:, :num_clean], z_t], dim=1),
            positions_R.expand(z_t.shape[0], -1),
            block_stream_mask(positions_T, num_clean, block_size),
        )
        return self.logits(hidden_BRC[:, num_clean:])

    def _compute_queries(
        self, x_BT: Tensor, permutation_BT: Tensor, first: int, prefix_B: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Compute the clean rows `[B, T, C]`, and queries `[B, M, C]` at the slots from `first`."""
        num_slots = x_BT.shape[1]
        query_positions_BM = permutation_BT[:, first:]
        queries_BM = torch.full_like(query_positions_BM, self.network_config.mask_token_id)
        slots_T = _range_like(x_BT)
        hidden_BRC = self.hidden_states(
            torch.cat([x_BT, queries_BM], dim=1),
            torch.cat([permutation_BT, query_positions_BM], dim=1),
            query_mask(slots_T, slots_T[first:], prefix_B),
        )
        return hidden_BRC[:, :num_slots], hidden_BRC[:, num_slots:]

    def _sort(self, permutation: Tensor, **tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Return the first text in slot order, and which slots it masks, each `[B, T]`."""
        self._check(permutation=permutation, **tokens)
        check_permutation(permutation)
        z_BT = next(iter(tokens.values())).gather(1, permutation)
        is_masked_BT = z_BT == self.network_config.mask_token_id
        _check_clean_first(is_masked_BT)
        return z_BT, is_masked_BT

    def _check(self, **tensors: Tensor) -> None:
        """Check shapes, dtypes and values.

        Raises:
            ValueError: A tensor is not int64 `[B, T]` with the values that it may have.
        """
        first, like = next(iter(tensors.items()))
        for name, tensor in tensors.items():
            if tensor.dim() != 2 or tensor.shape != like.shape:
                raise ValueError(
                    f"{name} has the shape {list(tensor.shape)}, not [B, T] as {first}'s "
                    f"{list(like.shape)}"
                )
            if tensor.dtype != torch.int64:
                raise ValueError(f"{name} is {tensor.dtype}, not torch.int64")
        if like.shape[1] > self.network_config.max_length:
            raise ValueError(
                f"T = {like.shape[1]} is more than max_length = {self.network_config.max_length}"
            )
        for name, tensor in tensors.items():
            if name != "permutation":
                check_tokens(name, tensor, self.network_config.vocab_size)


def _range_like(tokens_BT: Tensor) -> Tensor:
    """Return 0 .. T-1, int64 `[T]`."""
    return torch.arange(tokens_BT.shape[1], device=tokens_BT.device)


def find_next(permutation_BT: Tensor) -> Tensor:
    """Return which slots have the token that follows that of the slot before, bool `[B, T]`."""
    is_next_BT = permutation_BT.diff(dim=1) == 1
    return F.pad(is_next_BT, (1, 0))


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
