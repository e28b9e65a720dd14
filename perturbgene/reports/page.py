"""From the content of a page to one HTML file that loads nothing: text is escaped, script and style are hashed.

Owns HTML, how arrays reach the script, and the coordinates of charts; leaves what is said to the modules of each kind
of page. Letters: m cells on the map, c columns that color them.
"""

import base64
import functools
import hashlib
import importlib.resources
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import pandas as pd
from markupsafe import Markup

from perturbgene import __version__
from perturbgene.errors import InputError
from perturbgene.files import PAGE_MARKER, is_report, whole_file, write_text
from perturbgene.plots import save_figure

ASSETS = importlib.resources.files("perturbgene.reports") / "assets"
#: Most columns that color the map, most labels of one, and most letters of a name.
MOST_COLUMNS, MOST_LABELS, MOST_LETTERS = 30, 400, 80
#: Most findings that are shown at once.
MOST_FINDINGS = 4
#: The drawing area within the 360 x 250 units of a chart.
LEFT, TOP, WIDTH, HEIGHT = 58, 12, 290, 190


@dataclass(frozen=True)
class Page:
    """What a page is made of.

    Args:
        template: Its file in `assets`, which extends `page.html.jinja`.
        title, sentence: What was asked of what.
        findings: Sentences that a reader must not miss.
        sections: What the template names.
        data: What the script reads, as JSON without NaN; with "map" (a `map_data` or None) there is a map.
        figures: Name -> figure to save as PNG next to the page.
        tables: Name -> table to save as CSV next to the page.
        map_note: How the map was made.
        notes: Sentences at the end.
    """

    template: str
    title: str
    sentence: str
    findings: Sequence[str]
    sections: Mapping[str, Any]
    data: Mapping[str, Any]
    figures: Mapping[str, Any] = field(default_factory=dict)
    tables: Mapping[str, pd.DataFrame] = field(default_factory=dict)
    map_note: str = ""
    notes: Sequence[str] = ()


@contextmanager
def read_as_written(path: Path, *, verb: str) -> Iterator[None]:
    """Read and show a file that others may have changed since the verb wrote it.

    Raises:
        InputError: Something in it is missing, or of another kind than the verb writes.
    """
    try:
        yield
    except InputError:
        raise
    except (LookupError, TypeError, ValueError, AttributeError, StopIteration) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise InputError(
            f"{path} does not hold what {verb} writes ({reason}). Run {verb} again; --debug shows where it failed."
        ) from error


def write_page(page: Page, target: Path) -> None:
    """Write the page, then its figures as `STEM.NAME.png` and its tables as `STEM.NAME.csv`.

    Raises:
        InputError: The target is not a page of ours, a figure or table is there without a page, or one of them cannot
            be written.
    """
    figures = {target.with_suffix(f".{name}.png"): figure for name, figure in page.figures.items()}
    tables = {target.with_suffix(f".{name}.csv"): table for name, table in page.tables.items()}
    try:
        if target.exists() and not is_report(target):
            raise InputError(f"{target} exists and is not a report. Choose another --output.")
        if not target.exists() and (others := [path for path in (*figures, *tables) if path.exists()]):
            raise InputError(
                f"{others[0]} exists, but no report that it belongs to. Move it, or choose another --output."
            )
        write_text(target, render(page))
        for path, figure in figures.items():
            save_figure(figure, path)
        for path, table in tables.items():
            with whole_file(path) as temporary:
                table.to_csv(temporary, index=False)
    except OSError as error:
        raise InputError(f"{target} cannot be written ({error}). Choose another --output.") from error


@functools.cache
def _environment() -> jinja2.Environment:
    """Return what compiles templates, each of them once."""
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(lambda name: (ASSETS / name).read_text(encoding="utf-8")), autoescape=True,
        undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.filters |= {"percent": percent, "number": number, "text": text}
    return environment


def render(page: Page) -> str:
    """Return the page as HTML."""
    parts = {name: (ASSETS / f"page.{ending}").read_text(encoding="utf-8") for name, ending in _ENDINGS.items()}
    hashes = {f"{name}_hash": _hash(text) for name, text in parts.items()}
    embedded = {name: Markup(text) for name, text in parts.items()}
    body = _environment().get_template(page.template).render(
        **page.sections, **embedded, **hashes, content=page, data=page.data, version=__version__,
        most_findings=MOST_FINDINGS,
    )  # fmt: skip
    return f"{PAGE_MARKER}\n{body}"


_ENDINGS = {"script": "js", "style": "css"}


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def percent(share: float | None) -> str:
    """Write a share with one decimal; nothing for None and NaN."""
    return "" if share is None or not np.isfinite(share) else f"{100 * share:.1f} %"


def number(value: float | None) -> str:
    """Write a score with three decimals, a count with its thousands apart; nothing for None and NaN."""
    if value is None or not np.isfinite(value):
        return ""
    return f"{value:,}" if isinstance(value, int | np.integer) else f"{value:.3f}"


def text(value: object) -> str:
    """Write a label; nothing where it is missing."""
    return "" if pd.isna(value) else str(value)


def finite(values: np.ndarray | None) -> list[float | None] | None:
    """Return numbers as JSON takes them: rounded, and None for NaN."""
    if values is None:
        return None
    return [round(value, 4) if np.isfinite(value) else None for value in np.asarray(values, dtype=float).tolist()]


# -- the map ------------------------------------------------------------------------------------------------------


def packed(values: np.ndarray) -> str:
    """Return an array of bytes or little-endian 16-bit numbers as base64."""
    return base64.b64encode(np.ascontiguousarray(values).astype(values.dtype.newbyteorder("<")).tobytes()).decode()


def map_data(places_m2: np.ndarray, obs: pd.DataFrame) -> dict[str, Any]:
    """Return the cells of the map for the script: places, names and the columns that color them.

    Args:
        places_m2: Where each cell is, finite, shape (m, 2).
        obs: Rows of the same cells; columns of text or numbers. Those with one value, or too many labels, are left out.
    """
    low_2, span_2 = places_m2.min(axis=0), np.maximum(np.ptp(places_m2, axis=0), 1e-9)
    scaled_m2 = np.round((places_m2 - low_2) / span_2 * 65535).astype(np.uint16)
    columns = [column for name in obs.columns if (column := _column(str(name), obs[name])) is not None]
    names = [_short(name) for name in obs.index]
    places: dict[str, Any] = {"x": packed(scaled_m2[:, 0]), "y": packed(scaled_m2[:, 1])}
    places["aspect"] = float(np.clip(span_2[0] / span_2[1], 0.1, 10))
    return {"count": len(obs), **places, "names": names, "columns": columns[:MOST_COLUMNS]}


def _column(name: str, values: pd.Series) -> dict[str, Any] | None:
    """Return a column as codes of its labels, or as steps from its 1 % to its 99 % quantile; 0 has no value."""
    if values.dtype.kind in "iuf" and values.nunique() > 12:
        numbers_m = values.astype("float64").to_numpy()
        low, high = np.nanquantile(numbers_m, (0.01, 0.99)) if np.isfinite(numbers_m).any() else (0.0, 0.0)
        if not high > low:
            return None
        steps_m = 1 + np.clip((numbers_m - low) / (high - low), 0, 1) * 254
        codes_m = np.where(np.isfinite(numbers_m), np.nan_to_num(steps_m), 0).astype(np.uint8)
        return {"name": name, "kind": "number", "low": float(low), "high": float(high), "codes": packed(codes_m)}
    factor = pd.Categorical(values.astype(object).where(values.notna(), None)).remove_unused_categories()
    if not 1 <= len(factor.categories) <= MOST_LABELS:
        return None
    codes_m = (factor.codes.astype(np.int64) + 1).astype(np.uint16)
    return {"name": name, "kind": "label", "labels": [_short(it) for it in factor.categories], "codes": packed(codes_m)}


def _short(name: object) -> str:
    text = str(name)
    return text if len(text) <= MOST_LETTERS else f"{text[: MOST_LETTERS - 1]}…"


# -- charts -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Chart:
    """A chart whose x axis goes from `left` to `right` and whose y axis from `low` to `top`."""

    title: str
    x_label: str
    y_label: str
    low: float = 0.0
    top: float = 1.0
    left: float = 0.0
    right: float = 1.0
    has_diagonal: bool = False
    marker: str = ""  # id of a dot that the script moves
    bars: list[dict[str, Any]] = field(default_factory=list)
    lines: list[dict[str, Any]] = field(default_factory=list)
    points: list[dict[str, Any]] = field(default_factory=list)

    def x(self, value: float) -> float:
        """Return where a value of the x axis is."""
        return round(LEFT + WIDTH * (value - self.left) / (self.right - self.left), 1)

    def y(self, value: float) -> float:
        """Return where a value of the y axis is."""
        return round(TOP + HEIGHT * (self.top - value) / (self.top - self.low), 1)

    def add_line(self, name: str, x: Sequence[float], y: Sequence[float], *, counts: Sequence[int] = ()) -> None:
        """Add a line, with a dot for each point if counts are given, larger for more; its color goes by its number."""
        pairs = [(self.x(at), self.y(value)) for at, value in zip(x, y, strict=True) if np.isfinite([at, value]).all()]
        dots = [
            (*pair, round(2 + 5 * (count / max(counts)) ** 0.5, 1)) for pair, count in zip(pairs, counts, strict=False)
        ]
        self.lines.append({"name": name, "points": pairs, "dots": dots})

    def add_points(
        self, x: np.ndarray, y: np.ndarray, texts: Sequence[str], kinds: Sequence[str], names: Sequence[str]
    ) -> None:
        """Add points that say a text when they are pointed at; `kinds` are classes of the style.

        The first ones have their names next to them, as far as names do not overlap: give the most important first.
        """
        taken = list[tuple[float, float, float]]()  # left, right and height of each name
        for number, (at, value, text, kind) in enumerate(zip(x, y, texts, kinds, strict=True)):
            right, down, name, is_left = self.x(float(at)), self.y(float(value)), "", False
            if number < len(names):
                width = 6.2 * len(names[number])
                is_left = right + width > LEFT + WIDTH
                start = right - width - 5 if is_left else right + 5
                own = (start, start + width, down)
                if all(own[1] < one[0] or one[1] < own[0] or abs(own[2] - one[2]) > 10 for one in taken):
                    taken.append(own)
                    name = names[number]
            place = {"x": right, "y": down, "text": text, "kind": kind, "name": name, "is_left": is_left}
            self.points.append(place)

    def add_bars(self, heights_b: np.ndarray) -> None:
        """Add bars of equal width that fill the x axis."""
        width = WIDTH / max(len(heights_b), 1)
        for at, height in enumerate(heights_b.tolist()):
            place = {"x": round(LEFT + at * width, 2), "width": round(width * 0.85, 2), "y": self.y(height)}
            self.bars.append({**place, "height": round(TOP + HEIGHT - place["y"], 1)})


def even_ends(values: np.ndarray) -> tuple[float, float]:
    """Return the ends of an axis that holds all values, whose quarters are round numbers.

    Example:
        >>> even_ends(np.array([-0.3, 1.2])), even_ends(np.array([0.0, 7.0])), even_ends(np.array([]))
        ((-0.5, 1.5), (0.0, 8.0), (0.0, 1.0))
    """
    known = values[np.isfinite(values)]
    low, high = (float(known.min()), float(known.max())) if len(known) else (0.0, 1.0)
    if not high > low:
        low, high = min(low, 0.0), max(high, 0.0) if high or low else 1.0
    power = 10.0 ** np.floor(np.log10((high - low) / 4))
    for step in (power * factor for factor in (1, 2, 2.5, 5, 10, 20)):
        start = np.floor(low / step) * step
        if start + 4 * step >= high:
            break
    return round(float(start), 12), round(float(start + 4 * step), 12)
