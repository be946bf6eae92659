"""One round in a process of its own: ``python -m stages.evaluation.speed_round MODEL REQUEST.json ROUND.json``."""

from __future__ import annotations

import sys
from pathlib import Path

from stages.errors import UserError
from stages.evaluation.decode_round import REQUESTS, ROUNDS, time_round


def main(folder: str, request: str, answer: str) -> None:
    """Measure what the file ``request`` asks for and write the file ``answer``."""
    try:
        found = time_round(Path(folder), REQUESTS.validate_json(Path(request).read_bytes()))
    except UserError as error:
        sys.exit(f"error: {error}")
    Path(answer).write_bytes(ROUNDS.dump_json(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
