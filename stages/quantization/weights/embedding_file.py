"""The file of one quantized embedding: written whole or not at all; codes and scales are read separately."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from stages.errors import OptionError, in_one_line
from stages.quantization.weights.validate import InvalidFile, require_packed, require_table_scales
from stages.records.formats import EmbeddingPlan
from stages.records.results import QuantizedTable
from stages.system.atomic import atomic_file


@dataclass(frozen=True, slots=True)
class TableFile:
    """A safetensors file with ``packed`` and ``scales`` of one table; see QuantizedTable for their layout."""

    path: Path
    plan: EmbeddingPlan

    def is_finished(self) -> bool:
        """Return whether the file was written."""
        return self.path.is_file()

    def write(self, table: QuantizedTable) -> None:
        """Write ``table``; the file gets its name when it is whole."""
        with atomic_file(self.path) as partial:
            save_file({"packed": table.packed, "scales": table.scales}, partial)

    def read_packed(self) -> Tensor:
        """Load the codes, [ceil(V * D * bits / 8)] uint8.

        Raises:
            OptionError: the file is missing or damaged.
        """
        return self._read("packed", require_packed)

    def read_scales(self) -> Tensor:
        """Load the scales, in their stored type.

        Raises:
            OptionError: the file is missing or damaged.
        """
        return self._read("scales", require_table_scales)

    def _read(self, name: str, require: Callable[[Tensor, EmbeddingPlan], None]) -> Tensor:
        try:
            with safe_open(self.path, "pt") as file:
                tensor: Tensor = file.get_tensor(name)
            require(tensor, self.plan)
        except (OSError, SafetensorError, InvalidFile) as error:
            raise OptionError(
                f"{self.path} is missing or damaged ({in_one_line(error)}); delete it and run stages.quantize again to "
                "complete it."
            ) from error
        return tensor
