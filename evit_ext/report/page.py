"""The report's page: text, curves and pictures put into the template."""

from __future__ import annotations

import base64
import hashlib
import html
import re
from collections.abc import Sequence
from importlib import resources

from evit_ext.report.curves import chart
from evit_ext.report.pictures import KeptPatches
from evit_ext.report.records import RunRecords

# So many unreadable images are listed; all are in unreadable.csv.
_MOST_UNREADABLE = 200


def write(
    records: RunRecords, pictures: Sequence[KeptPatches], weights: str, notes: Sequence[str] = ()
) -> str:
    """Return the report as text, to be written in UTF-8.

    Nothing is fetched when it is opened, and its content security policy forbids it; it has no script.

    Args:
        records: of the run.
        pictures: of some validation images; may be empty.
        weights: what the pictures were made with, in words.
        notes: what there is to say besides, such as why there are no pictures.
    """
    page = resources.files("evit_ext.report").joinpath("report.html").read_text(encoding="utf-8")
    (style,) = re.findall(r"<style>(.*?)</style>", page, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    values = {
        "POLICY": f"default-src 'none'; img-src data:; base-uri 'none'; form-action 'none'; "
        f"style-src 'sha256-{digest}'",
        "TITLE": html.escape(f"{records.name}: report of the run"),
        "BODY": _body(records, pictures, weights, notes),
    }
    # In one go, so that what is put in is not itself searched.
    return re.sub(r"@@(POLICY|TITLE|BODY)@@", lambda found: values[found[1]], page)


def _body(records: RunRecords, pictures: Sequence[KeptPatches], weights: str, notes: Sequence[str]) -> str:
    parts = [f"<h1>{html.escape(records.name)}</h1>", *_facts(records)]
    parts += [f'<p class="soft">{html.escape(note)}</p>' for note in notes]
    parts += ["<h2>Curves</h2>", f'<div class="charts">{_charts(records)}</div>']
    parts += _evaluations(records)
    if pictures:
        parts += [
            "<h2>Patches kept of some validation images</h2>",
            f'<p class="soft">{html.escape(weights)}. The image as the model sees it, then what is left '
            "after each stage.</p>",
            f'<div class="photos">{"".join(map(_photo, pictures))}</div>',
        ]
    parts += _unreadable(records)
    settings = html.escape(records.config.to_yaml())
    parts.append(f"<h2>Settings</h2><details><summary>config.yaml</summary><pre>{settings}</pre></details>")
    return "\n".join(parts)


def _facts(records: RunRecords) -> list[str]:
    config, summary = records.config, records.summary
    lines = [
        f"{config.model}, {config.epochs} epochs, batch size {config.batch_size}, learning rate {config.lr:g}"
    ]
    if summary is None:
        step = records.rows[-1]["step"] if records.rows else 0
        lines.append(f"The run has not ended: the figures go to step {step:.0f}.")
    else:
        best = max(
            filter(None, (summary.get("best"), summary.get("best_ema"))), key=lambda score: score["top1"]
        )
        rate = summary["keep_rate"]
        at = "" if rate is None else f" at keep rate {rate:g}"
        lines.append(
            f"Best top-1 {best['top1']:.2f} % (epoch {best['epoch']}), {summary['gmacs']:.3g} "
            f"GMACs{at}, {summary['gmacs_dense']:.3g} dense; "
            f"{summary['images_per_second']:.4g} images/s in training"
        )
    return [f"<p>{html.escape(line)}</p>" for line in lines]


def _charts(records: RunRecords) -> str:
    curve, over = records.curve, records.horizontal
    return "".join(
        (
            chart(
                "Loss",
                {
                    "training": curve("train", "loss") or curve("epoch", "loss"),
                    "validation": curve("val", "loss"),
                    "moving average": curve("ema", "loss"),
                },
                over,
            ),
            chart(
                "Top-1 accuracy",
                {
                    "training": curve("epoch", "top1"),
                    "validation": curve("val", "top1"),
                    "moving average": curve("ema", "top1"),
                },
                over,
                " %",
            ),
            chart(
                "Keep rate", {"keep rate": curve("train", "keep_rate") or curve("epoch", "keep_rate")}, over
            ),
            chart("Learning rate", {"learning rate": curve("train", "lr")}, over),
            chart(
                "Throughput",
                {
                    "training": curve("epoch", "images_per_second"),
                    "evaluation": curve("val", "images_per_second"),
                },
                over,
                " images/s",
            ),
            chart("Gradient norm", {"gradient norm": curve("train", "grad_norm")}, over),
        )
    )


def _evaluations(records: RunRecords) -> list[str]:
    rows = [row for row in records.rows if row["kind"] in ("val", "ema")]
    if not rows:
        return []
    many_classes = any(row.get("top5", 100.0) < 100.0 for row in rows)
    heads = [
        "epoch",
        "weights",
        "top-1 %",
        *(["top-5 %"] if many_classes else []),
        "loss",
        "keep rate",
        "tokens left",
    ]
    lines = []
    for row in rows:
        cells = [
            f"{row['epoch']:.0f}",
            "moving average" if row["kind"] == "ema" else "model",
            _cell(row, "top1", ".2f"),
        ]
        cells += [_cell(row, "top5", ".2f")] if many_classes else []
        cells += [_cell(row, "loss", ".4f"), _cell(row, "keep_rate", "g"), _cell(row, "tokens_kept", ".1%")]
        lines.append("".join(f"<td>{cell}</td>" for cell in cells))
    head = "".join(f"<th>{name}</th>" for name in heads)
    body = "".join(f"<tr>{line}</tr>" for line in lines)
    return ["<h2>Evaluations</h2>", f'<div class="scroll"><table><tr>{head}</tr>{body}</table></div>']


def _cell(row: dict[str, float], name: str, form: str) -> str:
    return "–" if row.get(name) is None else format(row[name], form)


def _photo(photo: KeptPatches) -> str:
    names = ["as seen", *(f"{100 * share:.0f} % left" for share in photo.shares)]
    images = "".join(
        f'<span><img src="{url}" alt="{html.escape(name)}">{html.escape(name)}</span>'
        for url, name in zip(photo.stages, names, strict=True)
    )
    right = photo.label == photo.predicted
    said = (
        html.escape(photo.label)
        if right
        else (f'{html.escape(photo.label)}, <b class="wrong">taken for {html.escape(photo.predicted)}</b>')
    )
    return f'<figure class="photo"><figcaption>{said}</figcaption><div>{images}</div></figure>'


def _unreadable(records: RunRecords) -> list[str]:
    found = records.unreadable
    heading = f"<h2>Unreadable images: {len(found):,}</h2>"
    if not found:
        return [heading]
    lines = "".join(
        f'<tr><td class="path">{html.escape(path)}</td><td class="path">{html.escape(reason)}</td></tr>'
        for path, reason in found[:_MOST_UNREADABLE]
    )
    more = len(found) - _MOST_UNREADABLE
    note = f'<p class="soft">and {more:,} more, see unreadable.csv</p>' if more > 0 else ""
    return [heading, f'<div class="scroll"><table>{lines}</table></div>{note}']
