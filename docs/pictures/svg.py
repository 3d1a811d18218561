"""The parts of a picture as SVG elements.

A picture has a ground of its own, so that it is legible on light and on dark pages.
"""

from html import escape

GROUND, BORDER, INK, PALE = "#fbfbf9", "#c9c9c4", "#1f2328", "#5b626a"
BLUE, ORANGE, GREEN, UNUSED, EMPTY = "#3b78c2", "#dd8230", "#3d9a6b", "#c4c4c0", "#eeeeea"
SANS, MONO = "Helvetica, Arial, sans-serif", "Menlo, Consolas, monospace"


def draw_text(
    x: float,
    y: float,
    text: str,
    size: float = 13,
    weight: str = "normal",
    *,
    color: str = INK,
    font: str = SANS,
    anchor: str = "start",
) -> str:
    """Return a line of text with its base line at y."""
    font_style = f'font-family="{font}" font-size="{size:g}" font-weight="{weight}"'
    place = f'x="{x:g}" y="{y:g}" text-anchor="{anchor}"'
    return f'<text {place} {font_style} fill="{color}">{escape(text, quote=False)}</text>'


def draw_square(x: float, y: float, color: str, size: float) -> str:
    """Return a square."""
    return f'<rect x="{x:g}" y="{y:g}" width="{size:g}" height="{size:g}" rx="2" fill="{color}"/>'


def draw_box(x: float, y: float, width: float, height: float) -> str:
    """Return a box with a border."""
    return (
        f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="6" '
        f'fill="white" stroke="{BLUE}" stroke-width="1.5"/>'
    )


def draw_arrow(points: list[tuple[float, float]]) -> str:
    """Return an arrow through points."""
    corners = " ".join(f"{x:g},{y:g}" for x, y in points)
    return (
        f'<polyline points="{corners}" fill="none" stroke="{PALE}" stroke-width="2" '
        'marker-end="url(#head)"/>'
    )


def write_svg(width: float, height: float, parts: list[str]) -> str:
    """Return a whole SVG file with the parts on the picture's own ground."""
    head = (
        '<defs><marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="5" '
        f'markerHeight="5" orient="auto"><path d="M0 0 8 4 0 8z" fill="{PALE}"/></marker></defs>'
    )
    ground = (
        f'<rect x="0.5" y="0.5" width="{width - 1:g}" height="{height - 1:g}" rx="10" '
        f'fill="{GROUND}" stroke="{BORDER}"/>'
    )
    start = (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:g}" height="{height:g}" '
        f'viewBox="0 0 {width:g} {height:g}">'
    )
    return "\n".join([start, head, ground, *parts, "</svg>\n"])
