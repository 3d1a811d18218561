"""Losses of every objective from whole texts under dense masks, in float64.

Each stream is what it would be alone: a sample, or one document at its positions in the sample.
Sources: arXiv 2506.01928 and models/dit.py of its repository (Eso-LM), 2406.07524 (MDLM),
2503.09573 and models/dit.py of its repository (BD3-LM), 2607.01775 (Set Diffusion).

Shapes: T tokens of a stream, L rows of the dense network.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatron_eso.batches.rows import MicroBatch
from megatron_eso.objectives.objective import Samples
from tests.support.dense_oracle import OracleConfig, Parameters, dense_logits, token_losses


@dataclass(frozen=True, kw_only=True)
class Text:
    """A stream: clean tokens at positions, masks, and slots, all in natural order."""

    tokens_T: Tensor
    positions_T: Tensor
    is_masked_T: Tensor
    permutation_T: Tensor
    """`permutation[slot] = number of the token`."""

    def __len__(self) -> int:
        return len(self.tokens_T)


def ar_losses(
    parameters: Parameters, config: OracleConfig, text: Text, first_token: int | None
) -> Tensor:
    """`-log p` of each token in natural order; zero for a first token that is not predicted."""
    tokens, positions = text.tokens_T, text.positions_T
    if first_token is None:
        mask = torch.ones(len(text), len(text), dtype=torch.bool).tril()
        logits = dense_logits(parameters, config, tokens[None], positions[None], mask)[:, :-1]
        losses = token_losses(logits, tokens[None, 1:], config.mask_token_id)[0]
        return torch.cat([torch.zeros(1, dtype=torch.float64), losses])
    shifted = torch.cat([torch.tensor([first_token]), tokens])
    mask = torch.ones(len(text) + 1, len(text) + 1, dtype=torch.bool).tril()
    before = torch.cat([positions[:1] - 1, positions])
    logits = dense_logits(parameters, config, shifted[None], before[None], mask)[:, :-1]
    return token_losses(logits, tokens[None], config.mask_token_id)[0]


def mdlm_losses(parameters: Parameters, config: OracleConfig, text: Text) -> Tensor:
    """`-log p` of each masked token in natural order, zero at the others."""
    z_T = text.tokens_T.masked_fill(text.is_masked_T, config.mask_token_id)
    mask = torch.ones(len(text), len(text), dtype=torch.bool)
    logits = dense_logits(parameters, config, z_T[None], text.positions_T[None], mask)
    losses = token_losses(logits, text.tokens_T[None], config.mask_token_id)[0]
    return losses * text.is_masked_T


def block_losses(
    parameters: Parameters, config: OracleConfig, text: Text, block_size: int
) -> Tensor:
    """`-log p` of each masked token in natural order: the `2T x 2T` mask of BD3-LM."""
    block_T = torch.arange(len(text)) // block_size
    same, before = block_T[:, None] == block_T, block_T[:, None] > block_T
    mask = torch.cat(
        [torch.cat([same, before], dim=1), torch.cat([torch.zeros_like(same), same | before], 1)]
    )
    z_T = text.tokens_T.masked_fill(text.is_masked_T, config.mask_token_id)
    tokens_L, positions_L = torch.cat([z_T, text.tokens_T]), text.positions_T.repeat(2)
    logits = dense_logits(parameters, config, tokens_L[None], positions_L[None], mask)
    losses = token_losses(logits[:, : len(text)], text.tokens_T[None], config.mask_token_id)[0]
    return losses * text.is_masked_T


def diffusion_losses(
    parameters: Parameters, config: OracleConfig, text: Text, *, both_ways: bool
) -> Tensor:
    """`-log p` of each masked token of Eso-LM's diffusion phase, in natural order."""
    order = text.permutation_T
    z_T = text.tokens_T.masked_fill(text.is_masked_T, config.mask_token_id)[order]
    mask = _read_slots(text, both_ways=both_ways)
    logits = dense_logits(parameters, config, z_T[None], text.positions_T[order][None], mask)
    losses = token_losses(logits, text.tokens_T[order][None], config.mask_token_id)[0]
    return _to_natural(losses, text)


def sequential_losses(
    parameters: Parameters, config: OracleConfig, text: Text, *, both_ways: bool
) -> Tensor:
    """`-log p` of each masked token of Eso-LM's sequential phase, in natural order."""
    order = text.permutation_T
    tokens, positions = text.tokens_T[order], text.positions_T[order]
    z_T = text.tokens_T.masked_fill(text.is_masked_T, config.mask_token_id)[order]
    own, before = torch.eye(len(text), dtype=torch.bool), torch.ones(len(text), len(text)).tril(-1)
    clean = _read_slots(text, both_ways=both_ways)
    mask = torch.cat(
        [torch.cat([own, before.bool()], dim=1), torch.cat([torch.zeros_like(own), clean], dim=1)]
    )
    logits = dense_logits(
        parameters, config, torch.cat([z_T, tokens])[None], positions.repeat(2)[None], mask
    )
    losses = token_losses(logits[:, : len(text)], tokens[None], config.mask_token_id)[0]
    return _to_natural(losses, text)


def next_token_losses(parameters: Parameters, config: OracleConfig, text: Text) -> Tensor:
    """`-log p` of each masked token, where the row of the token before it predicts it if it can.

    Rows as in `sequential_losses`: queries of all slots, then the clean text.
    """
    order = text.permutation_T
    tokens, positions = text.tokens_T[order], text.positions_T[order]
    own, causal = torch.eye(len(text)).bool(), torch.ones(len(text), len(text)).tril().bool()
    mask = torch.cat(
        [torch.cat([own, causal & ~own], dim=1), torch.cat([torch.zeros_like(own), causal], dim=1)]
    )
    queries = torch.full_like(tokens, config.mask_token_id)
    logits = dense_logits(
        parameters, config, torch.cat([queries, tokens])[None], positions.repeat(2)[None], mask
    )[0]
    chosen = [
        len(text) + slot - 1 if slot and positions[slot - 1] + 1 == positions[slot] else slot
        for slot in range(len(text))
    ]
    losses = token_losses(logits[chosen][None], tokens[None], config.mask_token_id)[0]
    return _to_natural(losses, text)


def _read_slots(text: Text, *, both_ways: bool) -> Tensor:
    """Mask `[T, T]` in slot order: causal; of variant A, clean tokens also read each other."""
    is_clean = torch.arange(len(text)) < len(text) - int(text.is_masked_T.sum())
    causal = torch.ones(len(text), len(text), dtype=torch.bool).tril()
    return causal | (is_clean[:, None] & is_clean) if both_ways else causal


def _to_natural(losses_T: Tensor, text: Text) -> Tensor:
    natural = torch.zeros_like(losses_T).index_copy(0, text.permutation_T, losses_T)
    return natural * text.is_masked_T


def split_texts(
    tokens: np.ndarray,
    positions_in_slots: np.ndarray,
    is_masked: np.ndarray,
    documents: np.ndarray | None,
) -> list[Text]:
    """Return the streams of a sample, each in the order that the sample's order induces."""
    documents = np.zeros(len(tokens), dtype=np.int64) if documents is None else documents
    texts = []
    for number in range(documents.max(initial=-1) + 1):
        chosen = np.flatnonzero(documents == number)
        slots = positions_in_slots[np.isin(positions_in_slots, chosen)]
        texts.append(
            Text(
                tokens_T=torch.from_numpy(tokens[chosen]),
                positions_T=torch.from_numpy(chosen),
                is_masked_T=torch.from_numpy(is_masked[chosen]),
                permutation_T=torch.from_numpy(np.searchsorted(chosen, slots)),
            )
        )
    return texts


def read_texts(
    batch: MicroBatch, samples: Samples, *, next_after: int | None = None
) -> list[list[Text]]:
    """Return the streams of each sample; masks and orders are read from the loss rows.

    Args:
        batch: The plan.
        samples: What was planned.
        next_after: As in `positions_of`; tokens of the sequential phase are in natural order.
    """
    keys = positions_of(batch, next_after=next_after)
    texts = []
    for b, length in enumerate(samples.length_B.tolist()):
        masked = np.array([position for sample, position in keys if sample == b], dtype=np.int64)
        if next_after is not None and batch.phase_B[b]:
            masked = np.sort(masked)
        is_masked = np.isin(np.arange(length), masked)
        documents = None if samples.documents_BT is None else samples.documents_BT[b, :length]
        # The clean tokens' order, from the rows before the first loss row of the sample's stream.
        clean = [p for p in read_order(batch, b) if not is_masked[p]]
        slots = np.concatenate([clean, masked]).astype(np.int64)
        texts.append(split_texts(samples.tokens_BT[b, :length], slots, is_masked, documents))
    return texts


def read_order(batch: MicroBatch, sample: int) -> list[int]:
    """Return the positions of the rows that a sample's loss rows read, in the order of the rows."""
    rows, loss = batch.rows, batch.loss
    own = rows.loss_rows_E[: loss.num_real][loss.sample_E[: loss.num_real] == sample]
    read = {
        row
        for first_key, num_keys, first_own, num_own in rows.reads_4R[:, own].T.tolist()
        for row in (*range(first_key, first_key + num_keys), *range(first_own, first_own + num_own))
    }
    return list(dict.fromkeys(rows.positions_R[sorted(read)].tolist()))


def text_losses(
    settings: Mapping[str, Any],
    parameters: Parameters,
    config: OracleConfig,
    text: Text,
    *,
    is_sequential: bool,
) -> Tensor:
    """`-log p` of the predicted tokens of a stream in natural order, by its objective."""
    match settings.get("name", "eso_lm"):
        case "ar":
            first = None if settings.get("prepend_token") == "none" else config.mask_token_id
            return ar_losses(parameters, config, text, first)
        case "mdlm":
            return mdlm_losses(parameters, config, text)
        case "bd3_lm":
            return block_losses(parameters, config, text, settings["block_size"])
        case "eso_lm" if not is_sequential:
            both_ways = settings.get("variant") == "a"
            return diffusion_losses(parameters, config, text, both_ways=both_ways)
        case "eso_lm" if settings.get("sequential_prediction") == "next":
            return next_token_losses(parameters, config, text)
        case _:
            both_ways = settings.get("variant") == "a"
            return sequential_losses(parameters, config, text, both_ways=both_ways)


def dense_losses(
    settings: Mapping[str, Any],
    parameters: Parameters,
    config: OracleConfig,
    batch: MicroBatch,
    samples: Samples,
) -> Tensor:
    """`-log p` of each loss row of a plan, without padding; no token is left out by the plan.

    Args:
        settings: Keys of the section `objective`.
        parameters: Of the network.
        config: Of the network.
        batch: The plan, from which masks and orders are read.
        samples: What was planned.
    """
    is_next = settings.get("sequential_prediction") == "next"
    next_after = config.mask_token_id if is_next else None
    keys = positions_of(batch, next_after=next_after)
    expected: dict[tuple[int, int], Tensor] = {}
    for b, texts in enumerate(read_texts(batch, samples, next_after=next_after)):
        is_sequential = settings.get("name", "eso_lm") == "eso_lm" and bool(batch.phase_B[b])
        for text in texts:
            if text.is_masked_T.any():
                losses = text_losses(
                    settings, parameters, config, text, is_sequential=is_sequential
                )
                expected |= {
                    (b, int(p)): loss for p, loss in zip(text.positions_T, losses, strict=True)
                }
    assert len(set(keys)) == len(keys) > 0
    assert all(loss == 0 for key, loss in expected.items() if key not in set(keys))
    return torch.stack([expected[key] for key in keys])


def positions_of(batch: MicroBatch, *, next_after: int | None = None) -> list[tuple[int, int]]:
    """Return sample and position of each predicted token.

    Args:
        batch: The plan.
        next_after: The mask token, where every row with another token predicts the token after its
            own; None: a row has the position of its target.
    """
    rows, real = batch.rows, slice(batch.loss.num_real)
    positions = rows.positions_R[rows.loss_rows_E][real]
    if next_after is not None:
        positions = positions + (rows.tokens_R[rows.loss_rows_E][real] != next_after)
    return list(zip(batch.loss.sample_E[real].tolist(), positions.tolist(), strict=True))
