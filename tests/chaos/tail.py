"""Rows of a file that grows, each parsed once."""

import json
from pathlib import Path
from typing import Any


class Tail:
    """Of a .jsonl that others append to; a row whose end has not come is left for later, what is none is passed over."""

    def __init__(self, path: Path):
        self.path, self.offset, self.found = path, 0, list[dict[str, Any]]()

    def rows(self) -> list[dict[str, Any]]:
        """So far, oldest first."""
        if self.path.exists() and self.path.stat().st_size > self.offset:
            with self.path.open("rb") as file:
                file.seek(self.offset)
                whole = file.read().rpartition(b"\n")
            self.offset += len(whole[0]) + len(whole[1])
            self.found += [row for line in whole[0].splitlines() if (row := parsed(line))]
        return self.found


def parsed(line: bytes) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) else None
