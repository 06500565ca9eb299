"""How every picture of a report looks: colours, sizes, and labels at the ends of lines that keep off each other.

Okabe-Ito colours, of which colour-blind eyes tell every two apart: one a role of a response where one method is shown, one a method
where several are. Knows nothing of what is drawn.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Sequence
from itertools import takewhile
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, fontManager, get_font

BLUE, VERMILION, GREEN, ORANGE = "#0072B2", "#D55E00", "#009E73", "#E69F00"
SKY, PURPLE, BLACK, GREY = "#56B4E9", "#CC79A7", "#000000", "#555555"
ROLES = (("chosen", "real y", BLUE), ("rejected", "synthetic y'", VERMILION), ("proto", "proto y0", GREEN))
_GROUPS = (BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY, GREY, BLACK)
_STYLES = ("-", "--", ":", "-.", (0, (7, 1, 1, 1, 1, 1)), (0, (2, 4)))
CROWDED = 12  # groups, more than which have a legend instead of labels at the ends of their lines
WIDTH = 11.6  # inches, of 100 pixels on the page
# After matplotlib's own, which has no Chinese, Japanese and Korean: those of these that are installed.
_FALLBACKS = ("Noto Sans CJK SC", "Noto Sans CJK JP", "Noto Sans SC", "Source Han Sans SC", "WenQuanYi Zen Hei")
_FALLBACKS += ("WenQuanYi Micro Hei", "PingFang SC", "Hiragino Sans", "Microsoft YaHei", "Yu Gothic", "Malgun Gothic")
_FALLBACKS += ("Arial Unicode MS", "Droid Sans Fallback", "Unifont")
_FAMILIES = ["DejaVu Sans", *(name for name in _FALLBACKS if name in fontManager.get_font_names())]
LOOK: dict[Any, Any] = {
    "font.family": _FAMILIES,
    "font.size": 9.5,
    "text.parse_math": False,  # a label may hold a regular expression
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#777777",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e6e6e6",
    "xtick.color": "#333333",
    "ytick.color": "#333333",
    "savefig.dpi": 200,
    "savefig.facecolor": "white",
}


class Picture(NamedTuple):
    """A drawn figure; `width` in pixels of the page, `alt` for those who do not see it."""

    png: bytes
    width: int
    alt: str


def ink(colour: str) -> tuple[float, ...]:
    """The colour, darkened until text in it has the contrast 4.5 : 1 to white that WCAG asks for."""
    rgb = to_rgb(colour)
    while 1.05 / (0.05 + _luminance(rgb)) < 4.5:
        rgb = tuple(0.95 * part for part in rgb)
    return rgb


def _luminance(rgb: Sequence[float]) -> float:
    linear = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in rgb)
    return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear))


def finish(figure: Figure, labels: Iterable[tuple[Axes, list[Any]]], alt: str) -> Picture:
    """Lay out, move labels at the ends of lines off each other, and render."""
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    for axis, texts in labels:
        if texts:
            _spread_labels(axis, texts)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return Picture(buffer.getvalue(), round(100 * figure.get_figwidth()), alt)


def end_label(axis: Axes, y: float, text: str, colour: str) -> Any:
    transform = axis.get_yaxis_transform()
    return axis.text(1.015, y, text, color=ink(colour), transform=transform, va="center", fontsize=9, clip_on=False)


def _spread_labels(axis: Axes, texts: list[Any]) -> None:
    texts = sorted(texts, key=lambda text: text.get_position()[1])
    to_pixels, gap = axis.transData, 1.25 * 9 * axis.figure.dpi / 72
    bottom, top = axis.bbox.y0, axis.bbox.y1
    wanted = [min(max(to_pixels.transform((0, text.get_position()[1]))[1], bottom), top) for text in texts]
    # Up from the lowest, then down from the highest, which stays where its line ends if there is room below it.
    placed: list[float] = []
    for y in wanted:
        placed.append(max(y, placed[-1] + gap) if placed else y)
    limit = max(wanted[-1], min(top, bottom + gap * (len(wanted) - 1)))
    for i in reversed(range(len(placed))):
        placed[i] = min(placed[i], limit)
        limit = placed[i] - gap
    for text, y in zip(texts, placed):
        text.set_y(to_pixels.inverted().transform((0, y))[1])


def style_of(index: int) -> tuple[str, Any]:
    return _GROUPS[index % len(_GROUPS)], _STYLES[index // len(_GROUPS) % len(_STYLES)]


def drawable(text: str) -> str:
    """The text with those characters escaped (`\\u8bf7`) for which no font is there, and those that end a line."""
    fonts = [] if text.isascii() else [get_font(findfont(FontProperties(family=[name]))) for name in _FAMILIES]
    known = lambda c: c.isprintable() and (c.isascii() or any(font.get_char_index(ord(c)) for font in fonts))
    return "".join(c if known(c) else c.encode("unicode_escape").decode() for c in text)


def short_names(labels: Sequence[str], longest: int = 28) -> list[str]:
    """The labels, those cut that a picture has no room for: to their values alone (`spin, 1e-05` for `spin, learning_rate=1e-05`),
    or to their place in the list and what follows where they part from the one most like them. All are `drawable`."""
    labels = [drawable(label) for label in labels]
    bare = [re.sub(r"(^|, )\w+=", r"\1", label) for label in labels]
    names = []
    for i, (label, values) in enumerate(zip(labels, bare)):
        others = [*labels[:i], *labels[i + 1 :]]
        if len(label) <= longest:
            names.append(label)
        elif len(values) <= longest and bare.count(values) == 1 and values not in others:
            names.append(values)
        else:
            alike = (len([*takewhile(lambda pair: pair[0] == pair[1], zip(label, other))]) for other in others)
            room = longest - 6
            start = max(0, min(max(alike, default=0) - 2, len(label) - room))
            cut = label[start : start + room]
            names.append(f"{i + 1}: {'…' * (start > 0)}{cut}{'…' * (start + room < len(label))}")
    return names


def iteration_ticks(axis: Axes, iterations: Iterable[int], offset: float = 0.0) -> None:
    shown = sorted(set(iterations))
    shown = shown[:: -(-len(shown) // 12)] if shown else shown
    axis.set_xticks([t + offset for t in shown], ["π₀" if t < 0 else str(t) for t in shown])


def legend(figure: Figure, names: Sequence[str]) -> None:
    """The names of the methods in their colours, above all panels; the figure grows by its lines."""
    styles = [style_of(i) for i in range(len(names))]
    handles = [figure.axes[0].plot([], [], color=colour, ls=style, lw=2)[0] for colour, style in styles]
    inks = [ink(colour) for colour, _ in styles]
    columns = max(1, min(len(names), 110 // (max(map(len, names)) + 8)))
    figure.set_figheight(figure.get_figheight() + 0.18 * -(-len(names) // columns))
    figure.legend(handles, names, loc="outside upper left", ncols=columns, frameon=False, labelcolor=inks)
