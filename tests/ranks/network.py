"""The Megatron model's logits, losses and gradients of given texts and noise."""

import dataclasses
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import numpy as np
import torch
from megatron.core.utils import unwrap_model
from torch import Tensor

from megatron_eso.config.loading import read_config
from megatron_eso.config.sections import ParallelConfig
from megatron_eso.data.shards.reader import TokenDataset
from megatron_eso.model.sharding import shard_parameters
from megatron_eso.objectives.noise.schedule import LogLinearSchedule
from megatron_eso.objectives.noise.slots import Noise, draw_noise
from megatron_eso.training.checkpointing.checkpoints import Checkpoints
from megatron_eso.training.checkpointing.restore import restore
from megatron_eso.training.distributed.parallel import model_parallel_groups
from megatron_eso.training.steps.evaluation import for_evaluation
from megatron_eso.training.steps.step import forward_step, reduce_over_world, run_schedule
from megatron_eso.training.steps.train_state import build_train_state
from tests.ranks.training import open_batches
from tests.support.planning import eso_lm, plan_noise
from tests.support.training import (
    Overrides,
    tiny_config,
)

ALPHA_0 = 0.25


def compute_logits(run: Path, data: Path, overrides: Overrides, weights: str) -> list[Tensor]:
    """Compute the logits of the loss rows with the Megatron model, diffusion first.

    Returns:
        On the last pipeline stage x_0, is_masked, permutation of each phase and its logits [E, V].
    """
    config = tiny_config(run, data, overrides)
    dataset = TokenDataset.open(data / "train")
    length, alpha_0 = config.data.sequence_length, config.objective.alpha_0
    # Plan a micro-batch of each phase.
    answers: list[Tensor] = []
    micro_batches = []
    for is_sequential in (False, True):
        indices = np.arange(4)
        x_0 = dataset.rows(indices, length)
        times = np.array([0.1, 0.4, 0.7, 1.0])
        noise = draw_noise(
            7, indices, np.full(4, is_sequential), times, LogLinearSchedule(alpha_0), length
        )
        objective = eso_lm(dataset.mask_token_id, alpha_0=alpha_0)
        micro_batches.append(
            plan_noise(objective, x_0, noise, row_multiple=config.parallel.row_multiple)
        )
        answers += map(torch.from_numpy, (x_0, noise.is_masked_BT, noise.permutation_BT))

    # Restore the model, and keep what its head returns.
    with model_parallel_groups(config.parallel) as groups:
        batches = open_batches(config, groups.dp.size())
        state = build_train_state(config, groups)
        restore(state, config, Checkpoints(run / "checkpoints", config.checkpoint, batches))
        captured: list[Tensor] = []
        head = unwrap_model(state.chunks[-1])
        if head.post_process:
            head.output_layer.register_forward_hook(
                lambda _module, _inputs, output: captured.append(output[0].detach().clone())
            )

        def step(iterator, model):  # type: ignore[no-untyped-def]
            batch = next(iterator)
            return model(batch.rows, batch.loss.targets_E), lambda nll_E: (nll_E.sum(), nll_E)

        assert state.ema is not None
        average = state.ema.applied(state.chunks, state.optimizer)
        with (
            torch.no_grad(),
            for_evaluation(state.chunks),
            average if weights == "ema" else nullcontext(),
        ):
            run_schedule(step, state, micro_batches, len(micro_batches), groups, forward_only=True)
        # Gather the logits over the tensor-parallel ranks.
        for logits, micro_batch in zip(captured, micro_batches, strict=False):
            parts = [torch.empty_like(logits) for _ in range(groups.tp.size())]
            torch.distributed.all_gather(parts, logits.contiguous(), group=groups.tp)
            answers.append(torch.cat(parts, dim=-1)[: micro_batch.loss.num_real, 0])
    return answers


def compute_losses(run: Path, overrides: Overrides, golden: dict[str, Tensor]) -> list[Tensor]:
    """Per-token losses of both phases as the Megatron model gives them, without weights."""
    config = read_config(run / "config.json")
    keys = {key.removeprefix("parallel."): value for key, value in overrides.items()}
    values = {key: {"true": True, "false": False}.get(value, value) for key, value in keys.items()}
    # The reference's network has three layers.
    if "virtual_pipeline_model_parallel_size" in values:
        values["pipeline_model_parallel_layout"] = "Et|t|t|L"
    elif "pipeline_model_parallel_size" in values:
        values["pipeline_model_parallel_layout"] = "Ett|tL"
    config = dataclasses.replace(config, parallel=ParallelConfig(**values))
    mask_token_id = config.data.mask_token_id
    assert mask_token_id is not None
    # Plan the golden inputs of each phase.
    micro_batches = []
    for phase, masked in (("diffusion", "z_t"), ("sequential", "z_0")):
        is_masked = (golden[f"b.{phase}.{masked}"] == mask_token_id).numpy()
        is_sequential = np.full(len(is_masked), phase == "sequential")
        times = golden["b.diffusion.t"].double().numpy()
        noise = Noise(
            length_B=np.full(len(is_masked), is_masked.shape[1]),
            is_masked_BT=is_masked,
            permutation_BT=golden[f"b.{phase}.permutation"].numpy(),
            t_B=np.where(is_sequential, np.nan, times),
            is_sequential_B=is_sequential,
        )
        objective = eso_lm(mask_token_id, alpha_0=ALPHA_0)
        x_0, multiple = golden["b.diffusion.x0"].numpy(), config.parallel.row_multiple
        micro_batches.append(plan_noise(objective, x_0, noise, row_multiple=multiple))

    def step(iterator, model):  # type: ignore[no-untyped-def]
        batch = next(iterator)
        nll = model(batch.rows, batch.loss.targets_E)
        return nll, lambda nll_E: (nll_E.sum(), nll_E[: batch.loss.num_real])

    # Run the restored model on them.
    with model_parallel_groups(config.parallel) as groups:
        state = build_train_state(config, groups)
        restore(state, config, Checkpoints(run / "checkpoints", config.checkpoint, {}))
        for chunk in state.chunks:
            chunk.eval()
        with torch.no_grad():
            return run_schedule(
                step, state, micro_batches, len(micro_batches), groups, forward_only=True
            )


def compute_gradients(
    run: Path, data: Path, overrides: Overrides, megatron_tensors: dict[str, Tensor]
) -> tuple[float, dict[str, Tensor]]:
    """Loss of the first step and the gradients of this rank's shards, by global name and offset."""
    config = tiny_config(run, data, overrides)
    gradients = {}
    with model_parallel_groups(config.parallel) as groups:
        state = build_train_state(config, groups)
        model = unwrap_model(state.chunks[0])
        # Give the model the values of the tensors.
        for parameter, sharded in shard_parameters(model):
            index = _index(sharded)
            parameter.data.copy_(megatron_tensors[sharded.key][index])
        # Forward and backward of the first step.
        batches = open_batches(config, groups.dp.size())
        plan = batches.plan_step(batches.step(0, 0), groups.dp.rank())
        step = partial(
            forward_step,
            objective=batches.objective,
            tokens=plan.tokens,
            scale=len(plan.micro_batches),
            dropout_seed=None,
            pp_rank=0,
        )
        reports = run_schedule(
            step, state, plan.micro_batches, len(plan.micro_batches), groups, forward_only=False
        )
        # Put the gradients into tensors of the whole size.
        losses = reduce_over_world(torch.stack(reports).sum(0), groups)
        for parameter, sharded in shard_parameters(model):
            whole = torch.zeros_like(megatron_tensors[sharded.key])
            whole[_index(sharded)] = parameter.main_grad
            if whole.shape != parameter.shape:
                torch.distributed.all_reduce(whole)
            gradients[sharded.key] = whole
    return float(batches.objective.combine(losses[: len(losses) // 2])), gradients


def _index(sharded):  # type: ignore[no-untyped-def]
    return tuple(
        slice(start, start + size)
        for start, size in zip(sharded.global_offset, sharded.local_shape, strict=True)
    )
