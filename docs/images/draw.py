"""Draws the pictures of docs/kernels.md: `python docs/images/draw.py` writes the SVG files beside this one.

They carry their own background and their own colours for light and dark, so that they can be read wherever an
image can be shown. A test compares what this file draws with what is there.
"""

from __future__ import annotations

import struct
from pathlib import Path
from xml.sax.saxutils import escape

HERE = Path(__file__).parent

_STYLE = """
text { font: 14px system-ui, -apple-system, "Segoe UI", "DejaVu Sans", sans-serif; fill: #1b2430 }
.paper { fill: #ffffff; stroke: #d5dae1 } .dim { fill: #566273 } .small { font-size: 12px }
.mono { font-family: ui-monospace, "DejaVu Sans Mono", monospace; font-size: 13px }
.bold { font-weight: 600 } .on { fill: #ffffff }
.line { fill: none; stroke: #6b7787; stroke-width: 1.2 } .head { fill: #6b7787 }
.class { fill: #2563c9 } .kept { fill: #1a7f5a } .off { fill: #dde2e9 } .fused { fill: #c2601a }
.box { fill: #eef2f8; stroke: #9aa6b6 } .frame { fill: none; stroke: #6b7787 }
.dash { fill: none; stroke: #9aa6b6; stroke-dasharray: 4 3 }
.to-kept { fill: none; stroke: #1a7f5a; stroke-width: 1.4 }
.to-fused { fill: none; stroke: #c2601a; stroke-width: 1; opacity: .75 }
.to-class { fill: none; stroke: #2563c9; stroke-width: 1.4 }
@media (prefers-color-scheme: dark) {
  text { fill: #dde4ee } .paper { fill: #171c23; stroke: #333c48 } .dim { fill: #9fabba }
  .on { fill: #0e1217 } .line { stroke: #8995a5 } .head { fill: #8995a5 }
  .class { fill: #7fb0ff } .kept { fill: #58c79d } .off { fill: #39424f } .fused { fill: #f2a25c }
  .box { fill: #222a34; stroke: #586475 } .frame { stroke: #8995a5 } .dash { stroke: #586475 }
  .to-kept { stroke: #58c79d } .to-fused { stroke: #f2a25c } .to-class { stroke: #7fb0ff }
}
"""


class Drawing:
    """An SVG picture, `title` of which is read out to those who do not see it."""

    def __init__(self, width: int, height: int, title: str) -> None:
        self.parts = [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" '
            f'height="{height}" role="img">',
            f"<title>{escape(title)}</title>",
            f"<style>{_STYLE}</style>",
            '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="8" markerHeight="8" '
            'orient="auto"><path class="head" d="M0 0L8 4L0 8z"/></marker></defs>',
        ]
        self.rect(0.5, 0.5, width - 1, height - 1, "paper", radius=8)

    def rect(
        self, x: float, y: float, w: float, h: float, kind: str, radius: float = 3, opacity: float = 1
    ) -> None:
        faint = f' opacity="{opacity:g}"' if opacity != 1 else ""
        self.parts.append(
            f'<rect class="{kind}" x="{x:g}" y="{y:g}" width="{w:g}" height="{h:g}" rx="{radius:g}"{faint}/>'
        )

    def text(self, x: float, y: float, words: str, kind: str = "", anchor: str = "start") -> None:
        self.parts.append(
            f'<text class="{kind}" x="{x:g}" y="{y:g}" text-anchor="{anchor}">{escape(words)}</text>'
        )

    def box(self, x: float, y: float, w: float, h: float, kind: str, label: str, text: str = "") -> None:
        self.rect(x, y, w, h, kind)
        self.text(x + w / 2, y + h / 2 + 5, label, text, "middle")

    def line(self, *points: tuple[float, float], kind: str = "line", tip: bool = False) -> None:
        path = "M" + "L".join(f"{x:g} {y:g}" for x, y in points)
        end = ' marker-end="url(#tip)"' if tip else ""
        self.parts.append(f'<path class="{kind}" d="{path}"{end}/>')

    def svg(self) -> str:
        return "\n".join([*self.parts, "</svg>\n"])


def block() -> Drawing:
    """What a reorganising block does to the tokens: 12 patches, keep rate 0.5."""
    scores = [4, 11, 13, 3, 2, 10, 14, 9, 2, 5, 8, 6]
    kept = sorted(sorted(range(12), key=lambda j: (-scores[j], j))[:6])
    d = Drawing(640, 470, "A reorganising block keeps six of twelve patch tokens and fuses the others")
    left, step, size = 50, 42, 34

    def token(slot: int, y: float, kind: str, label: str, text: str = "on") -> None:
        d.box(left + slot * step, y, size, size, kind, label, f"{text} small bold")

    d.text(left, 30, "tokens that enter: the class token and 12 patches", "dim small")
    token(0, 40, "class", "cls")
    for j in range(12):
        token(j + 1, 40, "kept" if j in kept else "off", str(j), "on" if j in kept else "")
    d.line((left + 6 * step + size / 2, 74), (left + 6 * step + size / 2, 96), tip=True)
    d.box(left, 98, 13 * step - 8, 30, "box", "x + attention(x), over all 13 tokens")
    d.line((left + 6 * step + size / 2, 128), (left + 6 * step + size / 2, 148), tip=True)
    d.text(left, 164, "scores: how much the class token attends to each, the mean over heads", "dim small")
    for j, score in enumerate(scores):
        height = 4.2 * score
        d.rect(left + (j + 1) * step + 7, 236 - height, size - 14, height, "kept" if j in kept else "fused")
    d.line((left, 236), (left + 13 * step - 8, 236))
    slots = {j: slot for slot, j in enumerate(kept, start=3)}
    middle = size / 2

    def lead(start: float, end: float, kind: str) -> None:
        d.line((start, 240), (start, 250), (end, 322), (end, 338), kind=kind)

    for j in range(12):
        if j not in slots:
            lead(left + (j + 1) * step + middle, left + 9 * step + middle, "to-fused")
    for j, slot in slots.items():
        lead(left + (j + 1) * step + middle, left + slot * step + middle, "to-kept")
    lead(left + middle, left + 2 * step + middle, "to-class")
    token(2, 340, "class", "cls")
    for j, slot in slots.items():
        token(slot, 340, "kept", str(j))
    token(9, 340, "fused", "Σ")
    d.text(left + 10 * step, 353, "fused: Σ score · token", "dim small")
    d.text(left + 10 * step, 370, "of the other six", "dim small")
    d.line((left + 5.5 * step + middle, 374), (left + 5.5 * step + middle, 394), tip=True)
    d.box(left + 2 * step, 396, 8 * step - 8, 30, "box", "x + mlp(x), over 8 tokens")
    d.text(
        left,
        452,
        "Keep rate 0.5: K = ⌈0.5 · 12⌉ = 6. Kept tokens stay in order; later blocks see 8.",
        "dim small",
    )
    return d


def class_attention() -> Drawing:
    """What class_attention reads of the packed projection, and the row of the map that it computes."""
    d = Drawing(640, 400, "class_attention reads the class token's query and all keys, and forms one row")
    left, top, wide, high, tokens = 24, 76, 30, 18, 8
    d.text(left, 28, "qkv, the packed projection [N, 3 · H · D]", "bold")
    for part, name in enumerate(["queries", "keys", "values"]):
        x = left + part * 3 * wide
        d.text(x + 1.5 * wide, 52, name, "small", "middle")
        for head in range(3):
            d.text(x + (head + 0.5) * wide, 68, f"h{head}", "small dim", "middle")
            for n in range(tokens):
                kind = "class" if part == 0 and n == 0 else "kept" if part == 1 else "off"
                d.rect(x + head * wide + 1, top + n * high + 1, wide - 2, high - 2, kind, radius=2)
    d.text(left, top + tokens * high + 20, "Read in place: the class token's query", "small dim")
    d.text(left, top + tokens * high + 36, "and every key. The rest is not touched.", "small dim")

    right, cell = 352, 26
    rows = [[26, 5, 22, 8, 4, 19, 10, 6], [14, 4, 40, 6, 3, 18, 9, 6], [20, 12, 18, 7, 5, 26, 4, 8]]
    d.text(right, 28, "softmax(q · kₙ · scale) a head", "bold")
    for head, row in enumerate(rows):
        y = 44 + head * 34
        d.text(right, y + 17, f"h{head}", "small dim")
        for n, percent in enumerate(row):
            d.rect(right + 26 + n * 30, y, cell, 24, "box")
            d.rect(right + 26 + n * 30, y, cell, 24, "class", opacity=percent / 40)
    d.line((right + 145, 146), (right + 145, 172), tip=True)
    d.text(right + 156, 164, "mean over the heads", "small dim")
    means = [sum(column) / 3 for column in zip(*rows, strict=True)]
    for n, percent in enumerate(means):
        d.rect(right + 26 + n * 30, 176, cell, 24, "box")
        d.rect(right + 26 + n * 30, 176, cell, 24, "fused", opacity=percent / 32)
    d.text(right + 26, 220, "scores [N], float32", "small dim")

    d.text(left, 300, "A head's attention", "small")
    d.text(left, 316, "map, N × N:", "small")
    for n in range(tokens):
        for m in range(tokens):
            x, y = 150 + m * 16, 286 + n * 12
            if n == 0:
                d.rect(x, y, 14, 10, "class", radius=1)
            else:
                d.rect(x + 0.5, y + 0.5, 13, 9, "dash", radius=1)
    d.text(292, 296, "← the class token's row: N products of length D a head", "small")
    d.text(292, 324, "the others are not formed: attention itself runs", "small dim")
    d.text(292, 340, "in a kernel that keeps no map, either", "small dim")
    return d


def order_key(score: float) -> int:
    """The number of csrc/evit/order_key.h, of a float32 that is not NaN."""
    (bits,) = struct.unpack(">I", struct.pack(">f", score + 0.0))
    return bits ^ 0xFFFFFFFF if bits >> 31 else bits | 0x80000000


def selection() -> Drawing:
    """The radix selection on six real scores, K = 2, with a tie at the threshold."""
    scores, keep = [0.31, 0.06, 0.30, 0.12, 0.30, 0.02], 2
    keys = [order_key(score) for score in scores]
    d = Drawing(640, 330, "Radix selection finds the second largest of six scores byte by byte")
    d.text(24, 30, "K = 2 of six scores", "bold")
    for x, name in ((24, "patch"), (84, "score"), (452, "kept")):
        d.text(x, 74, name, "small dim")
    column = [160 + 70 * number for number in range(4)]
    candidates, prefix, wanted = set(range(6)), 0, keep
    digits = []
    for number in range(4):
        shift = 24 - 8 * number
        d.text(column[number] + 27, 58, f"pass {number + 1}", "small dim", "middle")
        d.text(column[number] + 27, 74, f"byte {3 - number}", "small dim", "middle")
        present = sorted(((keys[j] >> shift & 255) for j in candidates), reverse=True)
        digit = present[wanted - 1]
        wanted -= sum(other > digit for other in present)
        digits.append(digit)
        prefix |= digit << shift
        for j in range(6):
            byte = keys[j] >> shift & 255
            compared = "kept" if byte > digit else "class" if byte == digit else "off"
            kind = compared if j in candidates else "box"
            text = "on" if kind in ("kept", "class") else "dim" if kind == "box" else ""
            d.box(column[number], 84 + j * 30, 54, 24, kind, f"{byte:02x}", f"mono {text}")
        candidates = {j for j in candidates if keys[j] >> shift & 255 == digit}
    ties = wanted
    for j, score in enumerate(scores):
        y = 101 + j * 30
        d.text(34, y, str(j), "mono")
        d.text(84, y, f"{score:.2f}", "mono")
        tie = keys[j] == prefix and ties > 0
        ties -= tie
        if keys[j] > prefix or tie:
            d.text(452, y, "yes" if not tie else "yes, the first of a tie", "bold small")
        else:
            d.text(452, y, "no", "small dim")
    d.text(24, 284, f"the K-th largest key: {' '.join(f'{digit:02x}' for digit in digits)}", "mono")
    for x, kind, words in (
        (24, "kept", "above"),
        (110, "class", "agrees so far"),
        (244, "off", "below"),
        (326, "box", "decided before"),
    ):
        d.rect(x, 302, 14, 14, kind)
        d.text(x + 20, 314, words, "small dim")
    return d


def one_pass() -> Drawing:
    """What reorganize_tokens does with the rows once it is known which are kept."""
    d = Drawing(640, 330, "Kept rows are copied to their places, the others are summed into the fused token")
    kept, names = {1, 3, 4}, ["cls", "0", "1", "2", "3", "4", "5"]
    rows = [0, *(j + 1 for j in sorted(kept))]
    d.text(70, 30, "x [N, C]", "bold")
    d.text(420, 30, "tokens [P + K + 1, C]", "bold")
    for n, name in enumerate(names):
        y = 48 + n * 34
        kind = "class" if n == 0 else "kept" if n - 1 in kept else "off"
        d.text(60, y + 18, name, "small dim", "end")
        d.rect(70, y, 180, 26, kind)
        for strip in (1, 2):
            d.line((70 + strip * 60, y), (70 + strip * 60, y + 26), kind="dash")
        if n in rows:
            target = 48 + rows.index(n) * 34
            d.line(
                (254, y + 13),
                (290, y + 13),
                (380, target + 13),
                (416, target + 13),
                kind="to-class" if n == 0 else "to-kept",
            )
            d.rect(420, target, 180, 26, kind)
        else:
            d.line(
                (254, y + 13),
                (300, y + 13),
                (380, 48 + 4 * 34 + 13),
                (416, 48 + 4 * 34 + 13),
                kind="to-fused",
            )
    d.rect(420, 48 + 4 * 34, 180, 26, "fused")
    d.text(420, 48 + 5 * 34 + 12, "fused, summed in float32", "small dim")
    d.text(420, 48 + 5 * 34 + 28, "in ascending order, rounded once", "small dim")
    d.text(70, 304, "Fewer sequences than threads: each takes some columns (dashed). A column's", "small dim")
    d.text(
        70, 320, "sum is the same whoever forms it, so the bits do not depend on the threads.", "small dim"
    )
    return d


def cpu_attention() -> Drawing:
    """How attention_with_scores computes one head on the CPU."""
    d = Drawing(640, 440, "attention_with_scores: 24 queries at a time against packed keys and values")
    d.text(24, 30, "one head of qkv", "bold")
    for x, name, kind in ((24, "q", "box"), (74, "k", "kept"), (124, "v", "fused")):
        d.text(x + 20, 52, name, "small", "middle")
        d.rect(x, 58, 40, 170, kind, opacity=1 if kind == "box" else 0.55)
    d.rect(24, 100, 40, 34, "class")
    d.line((44, 246), (44, 138), tip=True)
    d.text(24, 262, "24 queries: an item", "small")
    d.text(24, 278, "of work for a thread", "small")
    d.text(24, 310, "N rows of D channels,", "small dim")
    d.text(24, 326, "where they lie in qkv", "small dim")

    d.text(220, 30, "packed once a head and thread", "bold")
    d.line((114, 84), (214, 84), tip=True)
    d.text(220, 54, "keys, transposed, in panels of 64", "small dim")
    for panel in range(4):
        d.rect(220 + panel * 66, 60, 62 if panel < 3 else 20, 46, "kept", opacity=0.55)
    d.text(448, 88, "D deep", "small dim")
    d.line((164, 196), (214, 196), tip=True)
    d.text(220, 152, "values, in panels of 64 channels", "small dim")
    d.rect(220, 158, 62, 76, "fused", opacity=0.55)
    d.text(292, 200, "N deep", "small dim")

    d.text(220, 266, "S = q · kᵀ · scale: 24 rows of N, then in their place P", "bold")
    d.rect(220, 276, 218, 60, "frame")
    for panel in range(1, 4):
        d.line((220 + panel * 66 - 2, 276), (220 + panel * 66 - 2, 336), kind="dash")
    d.rect(286 - 2, 291, 66, 15, "class")
    d.line((520, 298), (356, 298), tip=True)
    d.text(524, 294, "a tile: 6 × 64", "small")
    d.text(524, 310, "sums in registers", "small dim")
    d.text(448, 334, "row: max, exp, Σ", "small dim")
    d.line((330, 336), (330, 360), tip=True)
    d.text(342, 354, "P · v / Σ", "small")
    d.rect(220, 364, 218, 30, "class")
    d.text(448, 384, "24 rows of the result", "small dim")
    d.text(
        24,
        424,
        "The class token's scores come from class_attention's own loops, equal to the bit.",
        "small dim",
    )
    return d


DRAWINGS = {
    "block": block,
    "class-attention": class_attention,
    "selection": selection,
    "one-pass": one_pass,
    "cpu-attention": cpu_attention,
}

if __name__ == "__main__":
    for name, draw in DRAWINGS.items():
        (HERE / f"{name}.svg").write_text(draw().svg(), encoding="utf-8")
