"""What `detection` wrote, for people: python -m tests.benchmarks.tables detection.jsonl [--curves curves.svg]

Mean and spread over seeds in percent: the flagship, PaDiM and PatchCore on the same features; the threshold that the product
chose, on the test pictures; the share of drawn defects beside the share of real ones; every sum of terms. The curves are
escapes against false rejects, each seed a line, with the point that the product chose.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

EXPECTED, SURE = "about 5 % of good parts rejected", "at most 5 % of good parts rejected"
Line = dict[str, Any]
_WIDTH, _HEIGHT, _LEAST = 330, 230, 0.004
_COLOURS = ("#1b6ca8", "#c1440e", "#2e7d32")
_TICKS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5)


def _spread(values: list[float]) -> str:
    if not values:
        return ""
    return f"{np.mean(values):.1f}" + (f" ±{np.std(values):.1f}" if len(values) > 1 else "")


def _of_method(name: str, figure: str) -> Callable[[Line], float | None]:
    return lambda line: line["methods"].get(name, {}).get(figure)


def _of_wish(wish: str, figure: str) -> Callable[[Line], float | None]:
    return lambda line: line["promise"][wish][figure]


COLUMNS: dict[str, tuple[Callable[[Line], float | None], ...]] = {
    "AUROC": (_of_method("flagship", "auroc"),),
    "PaDiM": (_of_method("PaDiM", "auroc"),),
    "PatchCore": (_of_method("PatchCore", "auroc"),),
    "FPR@95": (_of_method("flagship", "fpr_at_95_recall"),),
    "AUPRO": (_of_method("flagship", "aupro"),),
    "good parts rejected, defects found at an expected 5 %": (
        _of_wish(EXPECTED, "false_rejects"),
        _of_wish(EXPECTED, "recall"),
    ),
    "at most 5 %": (_of_wish(SURE, "false_rejects"), _of_wish(SURE, "recall")),
    "drawn defects found at an expected 5 %": (_of_wish(EXPECTED, "drawn"),),
}


def table(lines: list[Line]) -> None:
    """One row for each set, and the means over sets."""
    sets = list(dict.fromkeys(line["set"] for line in lines))
    print("| set |", " | ".join(COLUMNS), "|")
    print("|---|" + "---|" * len(COLUMNS))
    means: dict[tuple[str, int], list[float]] = {}
    for name in sets:
        cells = []
        for title, figures in COLUMNS.items():
            parts = []
            for number, figure in enumerate(figures):
                values = [100 * v for v in map(figure, (line for line in lines if line["set"] == name)) if v is not None]
                parts.append(_spread(values) if len(figures) == 1 else f"{np.mean(values):.1f}")
                if values:
                    means.setdefault((title, number), []).append(float(np.mean(values)))
            cells.append(", ".join(parts))
        print(f"| {name} |", " | ".join(cells), "|")
    cells = [
        ", ".join(f"{np.mean(means[title, number]):.1f}" for number in range(len(figures)))
        for title, figures in COLUMNS.items()
    ]
    print("| mean |", " | ".join(cells), "|")


def drawn_and_real(lines: list[Line]) -> None:
    """How well drawn defects foretell the share of real ones that is found: over sets, at both wishes of 5 %."""
    sets = list(dict.fromkeys(line["set"] for line in lines))
    for wish in (EXPECTED, SURE):
        drawn, real = (
            np.array([np.mean([line["promise"][wish][key] for line in lines if line["set"] == name]) for name in sets])
            for key in ("drawn", "recall")
        )
        by_drawn, by_real = (np.argsort(np.argsort(values)) for values in (drawn, real))
        factor = real / np.maximum(drawn, 1e-9)
        print(
            f"{wish}: rank correlation of drawn and real shares over {len(sets)} sets {np.corrcoef(by_drawn, by_real)[0, 1]:.2f}; "
            f"real share / drawn share {', '.join(f'{name} {f:.2f}' for name, f in zip(sets, factor, strict=True))}"
        )


def sums(lines: list[Line]) -> None:
    """Image AUROC of every sum of terms, mean of the sets."""
    sets = list(dict.fromkeys(line["set"] for line in lines))
    for method in dict.fromkeys(method for line in lines for method in line["methods"]):
        values = [
            np.mean(
                [100 * line["methods"][method]["auroc"] for line in lines if line["set"] == name and method in line["methods"]]
            )
            for name in sets
        ]
        print(f"{np.mean(values):6.2f}  {method}: {', '.join(f'{value:.1f}' for value in values)}")


def _x(rate: float) -> float:
    """Place of a rate on the axis, which is logarithmic."""
    low, high = np.log(_LEAST), np.log(_TICKS[-1])
    return float(_WIDTH * (np.log(max(rate, _LEAST)) - low) / (high - low))


def curves(lines: list[Line]) -> str:
    """An SVG: escapes against false rejects, one drawing for each set."""
    drawings = []
    for number, name in enumerate(dict.fromkeys(line["set"] for line in lines)):
        parts = [f'<path d="M0 0V{_HEIGHT}H{_WIDTH}" fill="none" stroke="#999"/><text x="8" y="14">{name}</text>']
        parts += [f'<text x="{_x(t):.0f}" y="{_HEIGHT + 16}" text-anchor="middle">{100 * t:g}</text>' for t in _TICKS]
        parts += [f'<text x="-6" y="{_HEIGHT * (1 - t) + 4:.0f}" text-anchor="end">{100 * t:.0f}</text>' for t in (0, 0.5, 1)]
        of_set = [line for line in lines if line["set"] == name]
        for line, colour in zip(of_set, _COLOURS, strict=False):
            points = " ".join(f"{_x(float(rate)):.1f},{_HEIGHT * (1 - missed):.1f}" for rate, missed in line["curve"].items())
            chosen = line["promise"][EXPECTED]
            parts.append(f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="1.5"/>')
            parts.append(
                f'<circle cx="{_x(chosen["false_rejects"]):.1f}" cy="{_HEIGHT * chosen["recall"]:.1f}" r="4" fill="{colour}"/>'
            )
        left, top = 50 + (number % 3) * (_WIDTH + 60), 20 + number // 3 * (_HEIGHT + 60)
        drawings.append(f'<g transform="translate({left} {top})">{"".join(parts)}</g>')
    height = 20 + (len(drawings) + 2) // 3 * (_HEIGHT + 60)
    said = "escapes (%) against good parts rejected (%, logarithmic); dots: what an expected 5 % gave on these pictures"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {3 * (_WIDTH + 60) + 20} {height + 20}" '
        f'font-family="sans-serif" font-size="12"><rect width="100%" height="100%" fill="white"/>{"".join(drawings)}'
        f'<text x="50" y="{height + 10}">{said}</text></svg>\n'
    )


def main() -> None:
    """Print, and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--curves", type=Path)
    given = parser.parse_args()
    lines = [json.loads(line) for line in given.file.read_text().splitlines()]
    table(lines)
    print()
    drawn_and_real(lines)
    print()
    sums(lines)
    if given.curves is not None:
        given.curves.write_text(curves(lines))


if __name__ == "__main__":
    main()
