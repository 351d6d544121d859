"""Scores as text for a terminal."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

# The scores that are shown together; of the first the interval is shown too.
TABLES = (
    ("dice", "iou", "precision", "recall"),
    ("nsd", "hd", "hd95", "assd"),
    ("volume_error_ml", "volume_ml", "reference_volume_ml"),
    ("lesion_f1", "lesion_precision", "lesion_recall"),
)


def format_table(
    summary: Mapping[str, Mapping[str, np.ndarray]], class_names: Sequence[str]
) -> str:
    """Lays out mean ± sd over cases and 95 % intervals, a row per foreground class."""
    tables = []
    for names in TABLES:
        shown = [name for name in names if name in summary]
        if not shown:
            continue
        head, *others = shown
        columns: list[tuple[str, Iterable[object]]] = [("class", class_names[1:])]
        columns.append((head, _means(summary, head)))
        columns.append(("95 % interval", [_span(i, head) for i in summary[head]["interval"][1:]]))
        columns += [(name, _means(summary, name)) for name in others]
        columns.append(("cases", summary[head]["num"][1:]))
        if "hd" in shown:
            columns.append(("no distance", summary["hd"]["num_infinite"][1:]))
        tables.append(_aligned(columns))
    return "\n\n".join(tables)


def format_comparison(rows: Sequence[Mapping[str, Any]]) -> str:
    """Lays out what `compare` found."""
    return _aligned(
        [
            ("class", [row["class"] for row in rows]),
            ("score", [row["score"] for row in rows]),
            ("difference", [f"{row['difference']:+.4f}" for row in rows]),
            ("95 % interval", [_span(row["interval"], row["score"]) for row in rows]),
            ("p bootstrap", [f"{row['p']:.4f}" for row in rows]),
            ("p Wilcoxon", [f"{row['p_wilcoxon']:.4f}" for row in rows]),
            ("cases", [row["num"] for row in rows]),
        ]
    )


def _means(summary, name):
    """mean ± sd of each foreground class."""
    digits = _digits(name)
    return [
        f"{mean:.{digits}f} ± {sd:.{digits}f}"
        for mean, sd in zip(summary[name]["mean"][1:], summary[name]["sd"][1:], strict=True)
    ]


def _span(interval, name):
    low, high = interval
    return f"{low:.{_digits(name)}f} … {high:.{_digits(name)}f}"


def _digits(name):
    """Decimals of a score: millimetres and millilitres have two, shares four."""
    return 2 if name in ("hd", "hd95", "assd") or name.endswith("_ml") else 4


def _aligned(columns):
    """Lays out (heading, cells) columns; the first is flush left."""
    columns = [[heading, *map(str, cells)] for heading, cells in columns]
    widths = [max(map(len, column)) for column in columns]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if index else cell.ljust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in zip(*columns, strict=True)
    )
