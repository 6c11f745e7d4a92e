"""A drawn figure, as a PNG file and as an SVG inside a page, where every point says what it is."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from io import StringIO
from pathlib import Path
from xml.etree import ElementTree

import matplotlib
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.container import ErrorbarContainer
from matplotlib.figure import Figure

INK = "#1f2a37"
_SVG, _XLINK = "http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"
# The page's own colours, so that a figure follows it into the dark.
_THEMED = {INK: "currentColor", "#ffffff": "var(--paper)", "#000000": "currentColor", "#b0b0b0": "var(--line)"}

ElementTree.register_namespace("", _SVG)
ElementTree.register_namespace("xlink", _XLINK)


@dataclass
class Drawing:
    """A figure with words for what it shows.

    Args:
        name: of the figure, unique in a page.
        figure: matplotlib's.
        description: what it shows, for those who do not see it.
    """

    name: str
    figure: Figure
    description: str
    _marks: dict[str, list[dict[str, str]]] = field(default_factory=dict)

    def panels(self, count: int, sharey: bool = False) -> Sequence[Axes]:
        """That many axes beside each other."""
        made: Sequence[Axes] = self.figure.subplots(1, count, squeeze=False, sharey=sharey)[0]
        return made

    def add_tooltips(self, drawn: ErrorbarContainer, labels: Sequence[str], points: Sequence[str] = ()) -> None:
        """Say of each point of a series, in their order, what it is.

        Args:
            drawn: the series.
            labels: words for each.
            points: their names, where a page shows more of a point that is chosen.
        """
        gid = f"mark-{len(self._marks)}"
        drawn.lines[0].set_gid(gid)
        self._marks[gid] = [{"role": "img", "aria-label": label} for label in labels]
        for attributes, point in zip(self._marks[gid], points, strict=bool(points)):
            attributes |= {"role": "button", "data-point": point}

    def save(self, path: Path) -> None:
        """Write a PNG under its name only when it is complete; no date or version inside: equal figures are equal."""
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.stem}.partial.png")
        try:
            self.figure.savefig(partial, dpi=150, bbox_inches="tight", metadata={"Software": None})
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)

    def svg(self) -> Markup:
        """The figure for a page: in the page's colours, each point with its words."""
        written = StringIO()
        with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": self.name}):
            self.figure.savefig(
                written, format="svg", bbox_inches="tight", transparent=True,
                metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")),
            )  # fmt: skip
        root = ElementTree.fromstring(written.getvalue())
        for group in root.iter(f"{{{_SVG}}}g"):
            marks = self._marks.get(group.get("id", ""), [])
            for use, attributes in zip(group.iter(f"{{{_SVG}}}use"), marks, strict=False):
                use.attrib |= {"class": "mark", "tabindex": "-1", **attributes}
        root.attrib = {key: value for key, value in root.attrib.items() if key not in ("width", "height")}
        widest = round(6.6 * self.figure.get_figwidth())
        root.attrib |= {"role": "group", "aria-label": self.description, "style": f"max-width: {widest}rem"}
        return Markup(_themed(ElementTree.tostring(root, encoding="unicode"), self.name))


def _themed(svg: str, name: str) -> str:
    for colour, own in _THEMED.items():
        svg = svg.replace(colour, own)
    svg = re.sub(r' xmlns(:xlink)?="[^"]*"', "", svg).replace("xlink:href", "href")  # a page knows what an SVG is
    svg = re.sub(r"'DejaVu Sans'[^;\"]*", "inherit", svg)
    return re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{name}-", svg)  # ids are the page's, not the figure's


def new(name: str, width: float, height: float, description: str) -> Drawing:
    """An empty drawing, sizes in inches."""
    return Drawing(name, Figure(figsize=(width, height)), description)


def label_axes(axes: Axes, x_label: str, y_label: str) -> None:
    """What the axes show, on a light grid."""
    axes.set_xlabel(x_label, color=INK)
    axes.set_ylabel(y_label, color=INK)
    axes.tick_params(colors=INK)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(INK)


def legend(drawing: Drawing, axes: Axes) -> None:
    """The series of all panels, once, to their right."""
    handles, labels = axes.get_legend_handles_labels()
    drawing.figure.legend(
        handles, labels, loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False, fontsize=9, labelcolor=INK
    )
    drawing.figure.tight_layout()
