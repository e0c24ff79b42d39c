"""tokens.png: what the network still sees after each stage."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

_INK = "#1d2433"
_ACCENT = "#e8590c"
_TRUTH = "#5c7299"
_RIGHT = "#2b8a3e"
_WRONG = "#c92a2a"
_PAPER = np.array([0.93, 0.94, 0.96])
_NIGHT = np.array([0.07, 0.09, 0.14])
_LIGHT = np.array([1.0, 1.0, 1.0])


@dataclass(frozen=True)
class Column:
    """What one EViT did with the pictured images.

    Attributes:
        title: heading.
        survivors: for each stage bool [B, patches], the patches that are left.
        object_shares: for each stage the share of the object's patches that survive, over all test images.
        predicted: int64 [B].
    """

    title: str
    survivors: Sequence[Tensor]
    object_shares: Sequence[float]
    predicted: Tensor


def save_tokens_picture(
    path: Path,
    canvases: Tensor,
    labels: Tensor,
    object_patches: Tensor,
    columns: Sequence[Column],
) -> None:
    """Draw a row an image: the input, then for each EViT and stage the patches that survive.

    Args:
        path: where to write the PNG.
        canvases: float [B, S, S] in [0, 1].
        labels: int64 [B], what the images show.
        object_patches: bool [B, patches]; outlined in every picture.
        columns: the EViTs.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    try:
        # Not pyplot: no display is needed and no global state is touched.
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ModuleNotFoundError(
            'drawing tokens.png needs matplotlib: pip install "evit_ext[demo]"'
        ) from error
    rows = len(canvases)
    grid = round(object_patches.shape[1] ** 0.5)
    # A gap between the groups of pictures is a narrow column of the grid.
    widths: list[float] = [1.0]
    for column in columns:
        widths += [0.16] + [1.0] * len(column.survivors)
    cell, top, bottom, gap = 1.15, 0.9, 0.45, 0.06
    figure = Figure(figsize=(cell * sum(widths) + 0.5, cell * rows + top + bottom), facecolor="white")
    FigureCanvasAgg(figure)
    height = cell * rows + top + bottom
    axes = figure.subplots(
        rows,
        len(widths),
        squeeze=False,
        gridspec_kw={
            "width_ratios": widths,
            "wspace": gap,
            "hspace": gap,
            "left": 0.02,
            "right": 0.98,
            "top": 1 - top / height,
            "bottom": bottom / height,
        },
    )
    for axis in axes.flat:
        axis.axis("off")
    for row in range(rows):
        canvas = canvases[row].numpy()
        everything = np.ones((grid, grid), dtype=bool)
        _draw(axes[row, 0], canvas, everything, object_patches[row], grid)
        _tag(axes[row, 0], str(int(labels[row])), _TRUTH)
        position = 2
        for column in columns:
            for survivors in column.survivors:
                left = survivors[row].reshape(grid, grid).numpy()
                _draw(axes[row, position], canvas, left, object_patches[row], grid)
                position += 1
            predicted = int(column.predicted[row])
            _tag(axes[row, position - 1], str(predicted), _RIGHT if predicted == int(labels[row]) else _WRONG)
            position += 1
    axes[0, 0].set_title("input", fontsize=10, color=_INK, pad=5)
    position = 2
    for column in columns:
        count = len(column.survivors)
        for stage in range(count):
            share = float(column.survivors[stage].float().mean())
            title = (
                f"stage {stage + 1}\n{100 * share:.0f}% of patches\n"
                f"{100 * column.object_shares[stage]:.0f}% of the digit"
            )
            axes[0, position + stage].set_title(title, fontsize=8, color=_INK, pad=5)
        first, last = axes[0, position].get_position(), axes[0, position + count - 1].get_position()
        figure.text(
            (first.x0 + last.x1) / 2,
            1 - 0.1 / height,
            column.title,
            ha="center",
            va="top",
            fontsize=12,
            fontweight="bold",
            color=_INK,
        )
        position += count + 1
    figure.text(
        0.5,
        0.14 / height,
        "dark: patches that are left · light: dropped, fused into one token · orange: the digit's patches · "
        "number: true label, then predictions",
        ha="center",
        va="bottom",
        fontsize=8.5,
        color=_INK,
    )
    figure.savefig(path, dpi=160)


def _draw(axis: Any, canvas: npt.NDArray[Any], left: npt.NDArray[Any], outlined: Tensor, grid: int) -> None:
    """One picture: white ink on night where a patch is left, faint ink on paper where it is not."""
    patch = canvas.shape[0] // grid
    seen = np.kron(left, np.ones((patch, patch)))[..., None] > 0
    ink = canvas[..., None]
    kept = _NIGHT + (_LIGHT - _NIGHT) * ink
    dropped = _PAPER - 0.22 * ink
    axis.imshow(np.where(seen, kept, dropped), interpolation="nearest", extent=(0, grid, grid, 0))
    for line in range(1, grid):
        axis.axhline(line, color="white", linewidth=0.35, alpha=0.5)
        axis.axvline(line, color="white", linewidth=0.35, alpha=0.5)
    for segment in _outline(outlined.reshape(grid, grid).numpy()):
        axis.plot(*segment, color=_ACCENT, linewidth=1.1, solid_capstyle="round")
    axis.set_xlim(-0.06, grid + 0.06)
    axis.set_ylim(grid + 0.06, -0.06)


def _outline(cells: npt.NDArray[Any]) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """The edges between cells that are in and cells that are out, each ((x0, x1), (y0, y1))."""
    padded = np.pad(cells, 1)
    edges = []
    for y, x in zip(*np.nonzero(padded[1:, 1:-1] != padded[:-1, 1:-1]), strict=True):
        edges.append(((int(x), int(x) + 1), (int(y), int(y))))
    for y, x in zip(*np.nonzero(padded[1:-1, 1:] != padded[1:-1, :-1]), strict=True):
        edges.append(((int(x), int(x)), (int(y), int(y) + 1)))
    return edges


def _tag(axis: Any, text: str, color: str) -> None:
    """A number in the picture's lower right corner."""
    axis.text(
        0.965,
        0.045,
        text,
        transform=axis.transAxes,
        ha="right",
        va="bottom",
        fontsize=10,
        fontweight="bold",
        color="white",
        bbox={"boxstyle": "round,pad=0.22", "facecolor": color, "edgecolor": "none"},
    )
