"""What commands share in printing: tables, names, and the log in the terminal."""

import logging
from collections.abc import Sequence
from pathlib import Path


def log_to_terminal(main_process: bool) -> None:
    """Print the package's log messages, on other processes than the main one errors only."""
    from transformers.utils.logging import disable_progress_bar

    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("hf_camphive").setLevel(logging.INFO if main_process else logging.ERROR)
    disable_progress_bar()  # transformers shows one for each weights file that it reads or writes


def short_name(model: str) -> str:
    """Return the last part of a Hub id or path, without revision."""
    return Path(model).name.partition("@")[0]


def relative(path: Path) -> Path:
    """Return a path relative to the working directory where it is below it."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def format_table(rows: Sequence[tuple[str, ...]]) -> str:
    """Return rows of cells as aligned text: the first column to the left, the last as it is, others to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        first, *middle, remark = row
        cells = [first.ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(middle, widths[1:])), remark]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)
