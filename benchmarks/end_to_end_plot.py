"""The plot of end_to_end.py."""

from __future__ import annotations

from pathlib import Path

from evit_ext.benchmark import Row

ONNX = "ONNX Runtime"


def shown_in_plot(rows: list[Row]) -> list[Row]:
    """Return the rows that the plot is of: inference at the largest batch, not compiled."""
    shown = [row for row in rows if row.task == "inference" and row.mode in ("eager", "onnxruntime")]
    batch = max((row.batch for row in shown), default=0)
    return [row for row in shown if row.batch == batch]


def plot(rows: list[Row], path: Path, device: str) -> None:
    """Draw images per second against the keep rate, of the largest batch, a panel for each precision."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    shown = shown_in_plot(rows)
    batch = shown[0].batch
    precisions = list(dict.fromkeys(row.precision for row in shown))
    figure, axes = plt.subplots(1, len(precisions), figsize=(5.5 * len(precisions), 4.5), squeeze=False)
    names = {
        "EViT": "EViT, evit_ext",
        "plain EViT": "EViT, plain PyTorch",
        f"{ONNX} plain EViT": f"EViT, plain, {ONNX}",
        "DynamicViT": "DynamicViT",
    }
    for axis, precision in zip(axes[0], precisions, strict=True):
        here = [row for row in shown if row.precision == precision]
        for dense, style in (("dense", "--"), (f"{ONNX} dense", ":")):
            for row in [row for row in here if row.model == dense]:
                label = f"dense, {ONNX}" if ONNX in dense else "dense, timm"
                axis.axhline(row.images_per_second, color="gray", linestyle=style, label=label)
        for color, (kind, label) in enumerate(names.items()):
            line = [row for row in here if row.model.rpartition(" ")[0] == kind]
            if line:
                axis.plot(
                    [row.keep_rate for row in line],
                    [row.images_per_second for row in line],
                    marker="o",
                    color=f"C{color}",
                    label=label,
                )
        axis.set(
            title=f"{precision}, batch {batch}, {device}", xlabel="keep rate", ylabel="images per second"
        )
        axis.set_ylim(0, 1.1 * max(row.images_per_second for row in here))
        axis.invert_xaxis()
        axis.legend(loc="lower right", fontsize="small")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)
