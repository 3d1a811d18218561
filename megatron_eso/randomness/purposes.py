"""The registry of random streams: the purpose of each draw in training, data and sampler.

A purpose is one half of a generator's key, and the seed is the other. The meaning of a value never
changes, because existing runs and datasets depend on it. A new stream is a new line here.
"""

from enum import IntEnum

# It is increased when any value that an objective draws changes.
NOISE_VERSION = 1
# Changes when any initial weight changes. Version 1 drew whole tensors with torch's generator.
INIT_VERSION = 2


class Purpose(IntEnum):
    """The purpose of a stream of random bits."""

    # Training: by global index of the sample, or of the step's first sample.
    TIME = 1
    STRATUM = 2
    DIFFUSION_MASK = 3
    DIFFUSION_ORDER = 4
    SEQUENTIAL_MASK = 5
    SEQUENTIAL_ORDER = 6
    DROPOUT = 13
    LENGTH = 15
    # By hash of the parameter's name, and element.
    INITIAL_WEIGHT = 16

    # Validation: by index of the sample in the set.
    VALIDATION_TIME = 7
    VALIDATION_STRATUM = 8
    VALIDATION_DIFFUSION_MASK = 9
    VALIDATION_DIFFUSION_ORDER = 10
    VALIDATION_SEQUENTIAL_MASK = 11
    VALIDATION_SEQUENTIAL_ORDER = 12
    ANY_ORDER = 14

    # Generation: by row of the batch, and slot.
    GENERATION_SCHEDULE = 1001
    GENERATION_ORDER = 1002
    GENERATION_TOKEN = 1003
    # Texts on which two networks are compared, by number.
    PROBE = 1004

    # Data: keys of permutations. The values spell "blend", "docum", "order", "quarant" in ASCII.
    BLEND = 0x626C656E64
    DOCUMENTS = 0x646F63756D
    SAMPLE_ORDER = 0x6F72646572
    QUARANTINE = 0x71756172616E74
