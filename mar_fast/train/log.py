"""log.jsonl: a row for each step and each validation, and their curves as a picture."""

import json
from pathlib import Path
from typing import Any

from ..files import write_whole


class Log:
    """The log of a run, appended row by row.

    Args:
        path: The file.
        step: Where the run goes on from: rows of later steps, which it will take again, are removed.
    """

    def __init__(self, path: Path, step: int) -> None:
        rows = [row for row in read_log(path) if row["step"] <= step] if step and path.exists() else []
        write_whole(path, lambda file: file.write_text("".join(json.dumps(row) + "\n" for row in rows)))
        self.path, self._file = path, path.open("a")

    def add(self, row: dict[str, Any]) -> None:
        """Append a row."""
        try:
            self._file.write(json.dumps(row) + "\n")
            self._file.flush()
        except OSError as error:
            raise OSError(f"{self.path}: cannot be written ({error})") from error


def read_log(path: Path) -> list[dict[str, Any]]:
    """The rows of a log; a last one that was cut off is left out."""
    content = path.read_text()
    return [json.loads(line) for line in content[: content.rfind("\n") + 1].splitlines()]
