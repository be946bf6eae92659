"""What one piece of the graph hands to the next, batch by batch, in files: the residual stream, lengths, masks."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from stages.errors import UserError
from stages.one_line import in_one_line


@dataclass(frozen=True, slots=True)
class CarriedValues:
    """The values of the batches of one run through the pieces; ``folder`` is there and its own."""

    folder: Path

    def read(self, batch: str) -> dict[str, np.ndarray]:
        """Everything that was kept for ``batch``; nothing before its first piece."""
        file = self._file(batch)
        return load_file(file) if file.is_file() else {}

    def keep(self, batch: str, values: Mapping[str, np.ndarray], needed: Collection[str]) -> None:
        """Keep those of ``values`` that are still ``needed``, in place of what was kept for ``batch``."""
        kept = {name: np.ascontiguousarray(array) for name, array in values.items() if name in needed}
        file = self._file(batch)
        file.unlink(missing_ok=True)
        if not kept:
            return
        try:
            save_file(kept, file)
        except (OSError, SafetensorError) as error:
            raise UserError(
                f"What one part of the model hands to the next can't be written to {self.folder.parent.parent} "
                f"({in_one_line(error)}); free space there, choose another --cache_dir, or raise --max_memory."
            ) from error

    def _file(self, batch: str) -> Path:
        return self.folder / f"{batch}.safetensors"
