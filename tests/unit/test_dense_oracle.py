"""Rows compared with whole sequences under dense masks: losses and gradients, in float64."""

from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file

from checkpoints_conversion.official import fold_official, read_official
from megatron_eso.batches.dealing import Dealing, count_tokens
from megatron_eso.batches.rows import MicroBatch
from megatron_eso.config.objective import ObjectiveConfig
from megatron_eso.config.sections import Vocabulary
from megatron_eso.model.attention_backend import BACKENDS
from megatron_eso.objectives.build import build_objective
from megatron_eso.objectives.noise.schedule import LogLinearSchedule
from megatron_eso.objectives.noise.slots import Noise, diffusion_times, draw_noise
from megatron_eso.objectives.objective import Samples, Step
from tests.support.dense_oracle import (
    OracleConfig,
    Parameters,
    dense_losses,
    dense_objective,
    diffusion_logits,
    draw_parameters,
    gradients,
    row_losses,
    row_objective,
    sequential_logits,
    token_losses,
)
from tests.support.planning import eso_lm, plan_noise

GOLDEN = Path(__file__).parents[1] / "golden"
# The golden numbers are float32: tests/golden/README.md.
GOLDEN_TOLERANCE = 1e-4

SEED = 3
HIDDEN, VOCAB, MASK = 16, 11, 10
# Both sides are float64 sums of the same terms in another order.
LOSS_TOLERANCE = 1e-10
GRADIENT_TOLERANCE = 1e-10


def build_model(**options: int | bool) -> tuple[OracleConfig, Parameters]:
    num_groups = int(options.pop("num_groups", 4))
    num_layers = int(options.pop("num_layers", 3))
    config = OracleConfig(
        num_layers=num_layers, num_heads=4, num_groups=num_groups, mask_token_id=MASK
    )
    return config, draw_parameters(config, hidden_size=HIDDEN, vocab_size=VOCAB, **options)


def draw_batch(
    dealing: Dealing, alpha_0: float, length: int, length_B: NDArray[np.int64] | None = None
) -> tuple[NDArray[np.int64], Noise]:
    indices = np.arange(dealing.global_batch_size)
    x_0 = np.random.default_rng(SEED).integers(0, MASK, (len(indices), length))
    times = diffusion_times(SEED, 0, dealing.split, indices)
    is_sequential, schedule = dealing.split.phases(indices) == 1, LogLinearSchedule(alpha_0)
    noise = draw_noise(SEED, indices, is_sequential, times, schedule, length, length_B=length_B)
    return x_0, noise


def pick(noise: Noise, places: NDArray[np.int64]) -> Noise:
    return Noise(
        length_B=noise.length_B[places],
        is_masked_BT=noise.is_masked_BT[places],
        permutation_BT=noise.permutation_BT[places],
        t_B=noise.t_B[places],
        is_sequential_B=noise.is_sequential_B[places],
    )


def set_masks(noise: Noise, is_masked_BT: NDArray[np.bool_]) -> Noise:
    """Return the noise with other masks, and the slot order for these masks."""
    permutation = [
        np.concatenate([np.flatnonzero(~masked)[::-1], np.flatnonzero(masked)])
        for masked in is_masked_BT
    ]
    return Noise(
        length_B=noise.length_B,
        is_masked_BT=is_masked_BT,
        permutation_BT=np.stack(permutation),
        t_B=noise.t_B,
        is_sequential_B=noise.is_sequential_B,
    )


def assert_agree(
    x_0: NDArray[np.int64],
    noise: Noise,
    dealing: Dealing,
    *,
    alpha_0: float,
    loss_type: str = "elbo",
    row_multiple: int = 1,
    **options: int | bool,
) -> None:
    """Compare per-token losses, objective and every gradient."""
    # Plan the micro-batches of all ranks.
    config, parameters = build_model(**options)
    objective, backend = eso_lm(MASK, alpha_0=alpha_0, loss_type=loss_type), BACKENDS["torch"]()

    def plan(places: NDArray[np.int64]) -> MicroBatch:
        some = pick(noise, places)
        return plan_noise(objective, x_0[places], some, row_multiple=row_multiple)

    batches = [
        places
        for rank in range(dealing.data_parallel_size)
        for places in dealing.micro_batches(rank)
    ]
    # Compare the losses of single tokens with those of the dense model.
    losses = dense_losses(
        parameters, config, torch.from_numpy(x_0), noise, alpha_0=alpha_0, loss_type=loss_type
    )
    planned = [plan(places) for places in batches]
    for places, batch in zip(batches, planned, strict=True):
        real, loss_rows = slice(batch.loss.num_real), batch.loss
        nll = row_losses(parameters, config, batch, backend)[real]
        samples = places[loss_rows.sample_E[real].numpy()]
        expected = torch.cat(
            [
                losses.nll_BT[b, : noise.length_B[b]][-noise.is_masked_BT[b].sum() :]
                for b in dict.fromkeys(samples.tolist())
            ]
            or [nll]
        )
        assert len(nll) == noise.is_masked_BT[places].sum()
        assert torch.equal(losses.weights_B[samples].float(), loss_rows.weights_E[real])
        assert torch.equal(losses.elbo_weights_B[samples].float(), loss_rows.elbo_weights_E[real])
        assert ((nll - expected).abs() < LOSS_TOLERANCE).all()

    # Compare the objective and its gradients.
    expected_loss = dense_objective(losses, noise, dealing)
    phases = dealing.split.phases(np.arange(dealing.global_batch_size))
    tokens = count_tokens(noise.length_B, phases, 2)
    loss = row_objective(parameters, config, planned, objective, tokens, backend)
    assert abs((loss - expected_loss).item()) < LOSS_TOLERANCE
    expected_gradients, found_gradients = (gradients(x, parameters) for x in (expected_loss, loss))
    for name, expected in expected_gradients.items():
        assert (found_gradients[name] - expected).abs().max() < GRADIENT_TOLERANCE, name
    if noise.is_masked_BT.any():
        assert max(x.abs().max().item() for x in expected_gradients.values()) > 1e-3


@pytest.mark.parametrize("loss_type", ["elbo", "low_var"])
@pytest.mark.parametrize(
    ("alpha_0", "batch_split"), [(0.125, 0.5), (0.5, 0.75), (0.9, 0.25), (1.0, 1.0), (0.0, 0.0)]
)
def test_rows_give_the_losses_and_gradients_of_dense_masks(
    alpha_0: float, batch_split: float, loss_type: str
) -> None:
    dealing = Dealing(4, 4, 1, batch_split)
    x_0, noise = draw_batch(dealing, alpha_0, 12)
    assert_agree(x_0, noise, dealing, alpha_0=alpha_0, loss_type=loss_type, row_multiple=4)


@pytest.mark.parametrize("sizes", [(8, 1, 1), (8, 1, 2), (8, 2, 2), (8, 4, 1), (12, 3, 2)])
def test_the_objective_does_not_depend_on_micro_batches_and_ranks(
    sizes: tuple[int, int, int],
) -> None:
    dealing = Dealing(*sizes, 0.5)
    x_0, noise = draw_batch(dealing, 0.3, 7)
    assert_agree(x_0, noise, dealing, alpha_0=0.3, num_layers=2)


@pytest.mark.parametrize(
    "options",
    [
        {"num_groups": 1},
        {"num_groups": 2},
        {"num_layers": 1},
        {"num_groups": 2, "head_dim": 6, "qkv_biases": True},
    ],
)
@pytest.mark.parametrize("biases", [False, True])
def test_grouped_queries_wide_heads_and_one_layer_agree(
    options: dict[str, int], biases: bool
) -> None:
    dealing = Dealing(4, 4, 1, 0.5)
    x_0, noise = draw_batch(dealing, 0.4, 9)
    assert_agree(x_0, noise, dealing, alpha_0=0.4, biases=biases, head_bias=biases, **options)


@pytest.mark.parametrize("length", [1, 2, 6])
@pytest.mark.parametrize("masked", ["none", "all", "one", "all but one", "by sample", "last"])
@pytest.mark.parametrize("row_multiple", [1, 8])
def test_edge_cases_agree(length: int, masked: str, row_multiple: int) -> None:
    dealing = Dealing(4, 4, 1, 0.5)
    x_0, noise = draw_batch(dealing, 0.5, length)
    position, sample = np.arange(length)[None], np.arange(4)[:, None]
    is_masked = {
        "none": position < 0,
        "all": position >= 0,
        "one": position == length // 2,
        "all but one": position != length // 2,
        "by sample": (position >= 0) & (sample % 4 >= 2),
        "last": position == length - 1,
    }[masked]
    noise = set_masks(noise, np.broadcast_to(is_masked, (4, length)).copy())
    assert_agree(
        x_0, noise, dealing, alpha_0=0.5, row_multiple=row_multiple, num_layers=2, num_groups=2
    )


@pytest.mark.parametrize("sizes", [(8, 8, 1), (8, 1, 2), (8, 2, 2)])
@pytest.mark.parametrize(("alpha_0", "batch_split"), [(0.3, 0.5), (1.0, 1.0), (0.0, 0.0)])
def test_a_cut_sample_has_the_losses_of_a_sample_of_its_length(
    alpha_0: float, batch_split: float, sizes: tuple[int, int, int]
) -> None:
    """Compare with an oracle for each length, lengths 1 and 2 and whole samples included."""
    dealing, length_B = Dealing(*sizes, batch_split), np.array([1, 1, 9, 2, 7, 2, 12, 12])
    x_0, noise = draw_batch(dealing, alpha_0, 12, length_B)
    assert_agree(x_0, noise, dealing, alpha_0=alpha_0, row_multiple=4, num_layers=2, num_groups=2)


@pytest.mark.parametrize("order", ["uniform", "left_to_right"])
@pytest.mark.parametrize("cut", [False, True])
def test_any_order_ar_is_the_likelihood_in_the_orders_that_it_draws(order: str, cut: bool) -> None:
    """Read the orders from the queries; compare losses and gradients with the dense model."""
    # Plan a micro-batch, and read its orders.
    config, parameters = build_model(num_layers=2, num_groups=2)
    length_B = np.array([12, 1, 7, 2]) if cut else np.full(4, 12)
    x_0 = np.random.default_rng(SEED).integers(0, MASK, (4, 12))
    samples = Samples(tokens_BT=x_0, indices_B=40 + np.arange(4), length_B=length_B)
    section = ObjectiveConfig(name="any_order_ar", order=order)
    objective = build_objective(section, Vocabulary(size=VOCAB, mask_token_id=MASK), seed=SEED)
    batch = objective.plan(samples, Step(number=5, first_index=40, batch_size=4)).pad(8, MASK)
    queries = batch.rows.positions_R[batch.rows.loss_rows_E[: batch.loss.num_real]]
    orders = queries.split(length_B.tolist())
    assert all(sorted(o.tolist()) == list(range(n)) for o, n in zip(orders, length_B, strict=True))
    assert (orders[0].tolist() == list(range(12))) == (order == "left_to_right")

    # The losses of the dense model in these orders, then its gradients.
    losses = []
    for tokens, permutation in zip(x_0, orders, strict=True):
        text = torch.from_numpy(tokens[None, : len(permutation)])
        masked = torch.full_like(text, MASK)
        logits = sequential_logits(parameters, config, masked, text, permutation[None])
        losses.append(token_losses(logits, text.gather(1, permutation[None]), MASK)[0])
    backend, tokens_P = BACKENDS["torch"](), [int(length_B.sum())]
    nll = row_losses(parameters, config, batch, backend)[: batch.loss.num_real]
    assert (nll - torch.cat(losses)).abs().max() < LOSS_TOLERANCE
    expected = torch.cat(losses).sum() / length_B.sum()
    loss = row_objective(parameters, config, [batch], objective, tokens_P, backend)
    assert abs((loss - expected).item()) < LOSS_TOLERANCE
    expected_gradients, found = (gradients(x, parameters) for x in (expected, loss))
    for name, gradient in expected_gradients.items():
        assert (found[name] - gradient).abs().max() < GRADIENT_TOLERANCE, name


def test_alpha_0_of_1_masks_nothing_in_the_sequential_phase() -> None:
    dealing = Dealing(4, 2, 1, 0.5)
    x_0, noise = draw_batch(dealing, 1.0, 8)
    assert not noise.is_masked_BT[noise.is_sequential_B].any()
    assert_agree(x_0, noise, dealing, alpha_0=1.0)


def test_oracle_and_rows_give_the_numbers_of_the_reference() -> None:
    golden = load_file(GOLDEN / "tiny.safetensors")
    diffusion, sequential = (
        {name.split(".")[2]: x for name, x in golden.items() if name.startswith(f"b.{phase}.")}
        for phase in ("diffusion", "sequential")
    )
    # The model and the noise of the golden numbers.
    mask_token_id, x_0 = 97, diffusion["x0"]
    config = OracleConfig(num_layers=3, num_heads=4, num_groups=4, mask_token_id=mask_token_id)
    folded = fold_official(read_official(GOLDEN / "tiny.ckpt"))
    parameters = {name: tensor.double() for name, tensor in folded.items()}
    num_samples = len(x_0)
    is_masked = torch.cat([diffusion["z_t"], sequential["z_0"]]) == mask_token_id
    noise = Noise(
        length_B=np.full(2 * num_samples, x_0.shape[1]),
        is_masked_BT=is_masked.numpy(),
        permutation_BT=torch.cat([diffusion["permutation"], sequential["permutation"]]).numpy(),
        t_B=np.append(diffusion["t"].double().numpy(), np.full(num_samples, np.nan)),
        is_sequential_B=np.repeat([False, True], num_samples),
    )
    expected = torch.cat([diffusion["nll_elbo"], sequential["nll"]]).double()
    both = torch.cat([x_0, x_0])

    # Logits, then losses of the oracle, then losses of the rows.
    logits = diffusion_logits(parameters, config, diffusion["z_t"], diffusion["permutation"])
    assert (logits - diffusion["logits"]).abs().max() < GOLDEN_TOLERANCE
    logits = sequential_logits(
        parameters, config, sequential["z_0"], x_0, sequential["permutation"]
    )
    is_masked_slot = is_masked[num_samples:].gather(1, sequential["permutation"])
    assert (logits - sequential["logits"])[is_masked_slot].abs().max() < GOLDEN_TOLERANCE

    losses = dense_losses(parameters, config, both, noise, alpha_0=0.25, loss_type="elbo")
    weighted = losses.nll_BT * losses.weights_B[:, None]
    assert (weighted - expected).abs().max() < GOLDEN_TOLERANCE
    assert (losses.nll_BT[:num_samples] - diffusion["nll_low_var"]).abs().max() < GOLDEN_TOLERANCE

    batch = plan_noise(eso_lm(mask_token_id, alpha_0=0.25), both.numpy(), noise)
    found = row_losses(parameters, config, batch, BACKENDS["torch"]()) * batch.loss.weights_E
    in_slots = is_masked.gather(1, torch.from_numpy(noise.permutation_BT))
    assert (found - expected[in_slots]).abs().max() < GOLDEN_TOLERANCE
