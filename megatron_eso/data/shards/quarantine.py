"""The list of damaged records that a run leaves out; a person writes it.

The list is a JSON file: `{"format_version": 1, "records": {"<dataset id>": [record, ...]}}`. A data
row of a listed record is replaced by one of another record. A hash of the data row's number alone
chooses it, so it is the same on every rank and in every epoch. A longer list changes a replacement
only if it names the record of that replacement.

Shapes: R data rows.
"""

import hashlib
import itertools
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_eso.data.shards.format import ShardLayout
from megatron_eso.errors import DataError
from megatron_eso.randomness.permutation import permute, round_keys
from megatron_eso.randomness.purposes import Purpose

FORMAT_VERSION = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Quarantine:
    """The quarantine list of a run."""

    path: Path | None = None
    records: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """Record numbers in ascending order, by dataset id."""

    @classmethod
    def read(cls, path: Path) -> "Quarantine":
        """Read the list of damaged records from a file.

        Raises:
            DataError: The file cannot be read, or has another form.
        """
        try:
            content = json.loads(path.read_bytes())
        except (OSError, ValueError) as error:
            raise DataError(
                f"data.quarantine = {path}: cannot be read as JSON ({error}); correct the path or "
                f"the file, or leave the key out"
            ) from error
        if not _is_list_of_records(content):
            raise DataError(
                f"data.quarantine = {path}: is not a list of records; write "
                f'{{"format_version": {FORMAT_VERSION}, "records": {{"DATASET_ID": [RECORD]}}}}'
            )
        records = {name: tuple(sorted(set(found))) for name, found in content["records"].items()}
        return cls(path=path, records={name: found for name, found in records.items() if found})

    @property
    def sha256(self) -> str | None:
        """Hash of the listed records; None without any."""
        if not self.records:
            return None
        canonical = json.dumps(self.records, sort_keys=True).encode("ascii")
        return hashlib.sha256(canonical).hexdigest()

    def check(self, dataset_id: str, layout: ShardLayout) -> None:
        """Refuse a list that does not fit a dataset.

        Raises:
            DataError: The list names records that the dataset lacks, or half of all records.
        """
        listed = self.records.get(dataset_id, ())
        if listed and not 0 <= listed[0] <= listed[-1] < layout.num_records:
            raise DataError(
                f"data.quarantine = {self.path}: dataset {dataset_id} has records 0 to "
                f"{layout.num_records - 1}, not {[listed[0], listed[-1]]}; correct the list"
            )
        # The last record may have no data row; the others then have as many as are replaced.
        if 2 * len(listed) > layout.num_records - 1:
            raise DataError(
                f"data.quarantine = {self.path}: lists {len(listed)} of the {layout.num_records} "
                f"records of dataset {dataset_id}, half or more; restore it from its source"
            )

    def substitute(
        self,
        dataset_id: str,
        layout: ShardLayout,
        index_R: npt.NDArray[np.int64],
        sequence_length: int,
    ) -> npt.NDArray[np.int64]:
        """Return the data rows with those of listed records replaced.

        Args:
            dataset_id: Id of a dataset for which `check` passed.
            layout: Layout of the dataset.
            index_R: Numbers of data rows, int64 [R].
            sequence_length: Tokens of a data row.
        """
        listed = self.records.get(dataset_id)
        if listed is None:
            return index_R
        bad_records = np.array(listed, dtype=np.int64)
        num_rows = layout.num_rows(sequence_length)
        chosen_R = index_R.copy()
        for attempt in itertools.count():
            record_R, _ = layout.locate_rows(chosen_R, sequence_length)
            is_bad_R = np.isin(record_R, bad_records)
            if not is_bad_R.any():
                break
            # Each attempt has another permutation: a cycle of one may hold only listed data rows.
            keys = round_keys(0, Purpose.QUARANTINE, attempt)
            chosen_R[is_bad_R] = permute(index_R[is_bad_R].astype(np.uint64), num_rows, keys)
        return chosen_R


def _is_list_of_records(content: Any) -> bool:
    return (
        isinstance(content, dict)
        and content.keys() == {"format_version", "records"}
        and content["format_version"] == FORMAT_VERSION
        and isinstance(content["records"], dict)
        and all(
            isinstance(listed, list) and all(type(record) is int for record in listed)
            for listed in content["records"].values()
        )
    )
