"""Stories of one sentence each, as the files and hub data sets that hold them."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

STORIES = [
    f"Story {number} tells of {number * 7} ships and the {number}th harbour they never reached." for number in range(60)
]


def write_stories(path: Path, column: str = "text") -> Path:
    """Write them as the suffix of ``path`` says; ``column`` holds them where there are columns."""
    match path.suffix:
        case ".txt":
            path.write_text("\n\n\n".join(STORIES), encoding="utf-8")
        case ".jsonl":
            rows = [{"id": number, column: text} for number, text in enumerate(STORIES)]
            path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        case ".parquet":
            pq.write_table(pa.table({"id": list(range(len(STORIES))), column: STORIES}), path)
    return path


def hub_folder(folder: Path, column: str = "article") -> Path:
    """Write a data set as the hub stores it: card with named configurations, one parquet file a split."""
    (folder / "3.0.0").mkdir(parents=True)
    write_stories(folder / "3.0.0" / "train-00000-of-00001.parquet", column)
    files = "  data_files:\n  - split: train\n    path: 3.0.0/train-*\n"
    (folder / "README.md").write_text(f"---\nconfigs:\n- config_name: 3.0.0\n{files}---\n", encoding="utf-8")
    return folder
