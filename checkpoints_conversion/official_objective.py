"""Finds which objective an official checkpoint is of, and describes it for `config.json`."""

import logging
from dataclasses import asdict
from typing import Any

from checkpoints_conversion.official import OfficialCheckpoint, OfficialOptions
from megatron_eso.errors import CheckpointError, ConfigError
from megatron_eso.sampler.network.layers_eso_lm import NetworkConfig

logger = logging.getLogger(__name__)

ALGORITHMS = {"ar": "ar", "mdlm": "mdlm", "esolm": "eso_lm"}
"""The reference's names of the objectives."""
VARIANTS = {("causal", "causal"): "b", ("mixed2", "mixed"): "a"}
"""The variant by the attention modes of diffusion and sequential phase."""


def describe_official(
    checkpoint: OfficialCheckpoint, config: NetworkConfig, options: OfficialOptions
) -> dict[str, Any]:
    """Return the entries of a sampler's `config.json` that describe network, objective and source.

    Args:
        checkpoint: The checkpoint that was read.
        config: Its network.
        options: What the user states; this overrides what the checkpoint states.

    Raises:
        CheckpointError: The checkpoint is of another algorithm, or its network depends on time.
        ConfigError: An option does not fit the objective, or a bare backbone lacks one.
    """
    objective = options.objective or recognize_objective(checkpoint)
    if options.variant is not None and objective != "eso_lm":
        raise ConfigError(f"--variant: objective {objective} has no variants; leave it out")
    algorithm = checkpoint.section("algo")
    if checkpoint.has_adaln and algorithm.get("time_conditioning", False) is not False:
        raise CheckpointError(
            f"{checkpoint.path}: its algo.time_conditioning is {algorithm['time_conditioning']!r}, "
            "not False; give a checkpoint of a network that does not depend on time"
        )
    return {
        **asdict(config),
        "objective": objective,
        **DESCRIPTIONS[objective](checkpoint, config, options),
        "source": {
            "kind": "official",
            "step": checkpoint.step,
            "weights": checkpoint.weights,
            "sha256": checkpoint.sha256,
        },
    }


def recognize_objective(checkpoint: OfficialCheckpoint) -> str:
    """Return the objective that a checkpoint states; without adaLN it is the reference's AR model.

    Raises:
        CheckpointError: The checkpoint is of an algorithm that the sampler does not have.
        ConfigError: The file is a bare backbone, which states no objective.
    """
    if checkpoint.is_bare:
        raise ConfigError(
            f"{checkpoint.path}: is a bare backbone, which states no objective; name it by "
            "--objective"
        )
    name = checkpoint.section("algo").get("name", "esolm")
    if name not in ALGORITHMS:
        raise CheckpointError(
            f"{checkpoint.path}: its algo.name is {name!r}; give a checkpoint of "
            f"{', '.join(ALGORITHMS)}, or name the objective by --objective"
        )
    return ALGORITHMS[name] if checkpoint.has_adaln else "ar"


def recognize_variant(checkpoint: OfficialCheckpoint, alpha_0: float) -> str:
    """Return the variant of an Eso-LM by the attention modes of the phases that it has.

    Raises:
        CheckpointError: No variant has these modes.
    """
    algorithm = checkpoint.section("algo")
    keys = ("diffusion_attn_mode", "sequential_attn_mode")
    is_used = (alpha_0 > 0, alpha_0 < 1)
    found = [algorithm.get(key, "causal") for key in keys]
    for modes, variant in VARIANTS.items():
        if all(a == b or not used for a, b, used in zip(found, modes, is_used, strict=True)):
            return variant
    stated = " and ".join(f"algo.{key} {mode!r}" for key, mode in zip(keys, found, strict=True))
    raise CheckpointError(
        f"{checkpoint.path}: its {stated} are of no variant of Eso-LM; name it by --variant"
    )


def _describe_eso_lm(
    checkpoint: OfficialCheckpoint, config: NetworkConfig, options: OfficialOptions
) -> dict[str, Any]:
    alpha_0 = checkpoint.section("algo").get("alpha_0")
    if not isinstance(alpha_0, int | float):
        # Without a schedule the network is that of pure diffusion.
        alpha_0 = 1.0
        logger.warning("%s: states no algo.alpha_0; alpha_0 is set to 1", checkpoint.path)
    variant = options.variant or recognize_variant(checkpoint, alpha_0)
    return {"alpha_0": float(alpha_0), "variant": variant, "order": "left_to_right"}


def _describe_mdlm(
    checkpoint: OfficialCheckpoint, config: NetworkConfig, options: OfficialOptions
) -> dict[str, Any]:
    return {}


def _describe_ar(
    checkpoint: OfficialCheckpoint, config: NetworkConfig, options: OfficialOptions
) -> dict[str, Any]:
    """Return what predicts the first token, as the reference's `algo.prepend_token` states it."""
    kind = checkpoint.section("algo").get("prepend_token")
    if kind not in ("mask", "bos", "none"):
        kind = "none"
        logger.warning(
            "%s: states no algo.prepend_token; prepend_token is set to none", checkpoint.path
        )
    if kind == "bos" and options.bos_token_id is None:
        raise ConfigError(
            f"{checkpoint.path}: its algo.prepend_token is bos; give --tokenizer with a bos token"
        )
    return {"prepend_token": kind, "bos_token_id": options.bos_token_id}


def _describe_bd3_lm(
    checkpoint: OfficialCheckpoint, config: NetworkConfig, options: OfficialOptions
) -> dict[str, Any]:
    if options.block_size is None:
        logger.warning(
            "%s: states no block size; block_size is set to the length, %d: see --block-size",
            checkpoint.path,
            config.max_length,
        )
    return {"block_size": options.block_size or config.max_length}


def _describe_set_dlm(
    checkpoint: OfficialCheckpoint, config: NetworkConfig, options: OfficialOptions
) -> dict[str, Any]:
    sizes = {"set_size": options.set_size, "max_set_size": options.max_set_size}
    if None not in sizes.values():
        return {"order": "staggered", **sizes}
    logger.warning(
        "%s: states no set sizes; the order is left to right, which is that of set size 1: see "
        "--set-size and --max-set-size",
        checkpoint.path,
    )
    return {"order": "left_to_right"}


def _describe_any_order_ar(
    checkpoint: OfficialCheckpoint, config: NetworkConfig, options: OfficialOptions
) -> dict[str, Any]:
    return {"order": "uniform"}


DESCRIPTIONS = {
    "eso_lm": _describe_eso_lm,
    "mdlm": _describe_mdlm,
    "ar": _describe_ar,
    "bd3_lm": _describe_bd3_lm,
    "set_dlm": _describe_set_dlm,
    "any_order_ar": _describe_any_order_ar,
}
"""Returns the fields of each objective; what no side states is chosen with a warning."""
