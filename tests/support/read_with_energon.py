"""Prepares datasets for megatron-energon and reads them with it; runs in `.venv-interop`.

python read_with_energon.py DATASET OUT.npz [DATASET OUT.npz ...]: writes the tokens of every
record, an array by the record's key.
"""

import sys

import numpy as np
from megatron.energon import (
    Cooker,
    DefaultTaskEncoder,
    TextSample,
    WorkerConfig,
    basic_sample_keys,
    get_loader,
    get_train_dataset,
    reraise_exception,
    stateless,
)
from megatron.energon.tools.prepare import command as prepare

PREPARE_OPTIONS = (
    *("--non-interactive", "--split-ratio", "1,0,0"),
    *("--sample-type", "CrudeWebdataset"),
)
DTYPES = {"tokens.u16": "<u2", "tokens.u32": "<u4"}


@stateless
def cook_record(sample: dict) -> TextSample:
    """Decode the record's tokens in place of a text; the member's extension names their type."""
    ((name, data),) = ((key, value) for key, value in sample.items() if key.startswith("tokens."))
    tokens = np.frombuffer(data, dtype=DTYPES[name])
    return TextSample(**basic_sample_keys(sample), text=tokens)


class RecordEncoder(DefaultTaskEncoder):
    """Hands records out as they are."""

    decoder = None
    cookers = (Cooker(cook_record),)


def read_records(directory: str) -> dict[str, np.ndarray]:
    """Every record once, in energon's order."""
    dataset = get_train_dataset(
        directory,
        worker_config=WorkerConfig(
            rank=0, world_size=1, num_workers=0, global_error_handler=reraise_exception
        ),
        batch_size=None,
        shuffle_buffer_size=None,
        max_samples_per_sequence=None,
        task_encoder=RecordEncoder(),
        repeat=False,
    )
    records = {}
    for sample in get_loader(dataset):
        key = sample.__key__
        assert key not in records, f"{key} came twice"
        records[key] = sample.text
    return records


if __name__ == "__main__":
    for directory, out in zip(sys.argv[1::2], sys.argv[2::2], strict=True):
        prepare.main([*PREPARE_OPTIONS, directory], standalone_mode=False)
        np.savez(out, **read_records(directory))
