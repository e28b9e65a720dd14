"""What a page says of networks of genes: the strongest links of each group, drawn and as a table.

Owns reading what `embed --network` has written; leaves HTML to `page`. Letters: g genes of a drawing.
"""

from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import networkx
import pandas as pd
from scipy import sparse

from perturbgene.data_utils.opening import open_source
from perturbgene.data_utils.sources import StoredCells
from perturbgene.embedding.genes import NETWORK_KEY
from perturbgene.errors import InputError
from perturbgene.inference.held_out import about_untrained
from perturbgene.inference.run import facts_of
from perturbgene.inference.streaming import ALL
from perturbgene.plots import network_figure
from perturbgene.reports.page import Page

#: Most groups with a section, genes of a drawing, and links of a table.
MOST_GROUPS, MOST_GENES, MOST_LINKS = 8, 30, 40
#: Size of a drawing and its margin; names need some room.
WIDTH, HEIGHT, MARGIN = 720, 480, 60


@dataclass(frozen=True)
class Networks:
    """What `embed --network` has written.

    Args:
        path, run: The output, and the run that was asked.
        genes: Rows of `obs`: `symbol`, `group` and `n_cells`.
        links: A row for each link: `group`, `a`, `b` (rows of `genes`) and `weight`, the strongest first.
    """

    path: Path
    run: str
    genes: pd.DataFrame
    links: pd.DataFrame


def read_networks(path: Path) -> Networks | None:
    """Read what `embed --network` has written; None if the file is not about mean embeddings of genes.

    Raises:
        InputError: It is about genes, but has no network.
    """
    with closing(open_source(str(path))) as source:
        facts = facts_of(source)
        if not isinstance(source, StoredCells) or facts.get("verb") != "embed":
            return None
        genes, matrix = source.table("obs").reset_index(drop=True), source.element(f"obsp/{NETWORK_KEY}")
        if "n_cells" not in genes:
            return None
    if matrix is None:
        raise InputError(f"{path} has no network of genes. Run `perturbgene embed` again, with --network.")
    genes = genes.astype({"symbol": str, "group": str})
    upper = sparse.triu(sparse.csr_matrix(matrix), k=1).tocoo()
    links = pd.DataFrame({"a": upper.row, "b": upper.col, "weight": upper.data.astype(float)})
    links["group"] = genes["group"].to_numpy()[links["a"]]
    return Networks(path, str(facts["run"]), genes, links.sort_values("weight", ascending=False, kind="stable"))


def of_networks(networks: Networks) -> Page:
    """Return the page about networks, with a figure for each drawing."""
    groups = list(networks.genes["group"].unique())
    drawn = [_group(networks, name, number) for number, name in enumerate(groups[:MOST_GROUPS])]
    figures = {
        f"network{number}": network_figure(
            {node["name"]: (node["x"], HEIGHT - node["y"]) for node in one["nodes"]},
            [(link["a"], link["b"]) for link in one["lines"]], title=one["title"],
        )
        for number, one in enumerate(drawn)
    }  # fmt: skip
    findings = [
        *about_untrained(networks.run),
        "Two genes are linked because this run uses them in similar ways. That is no evidence that one regulates the "
        "other, and nothing here was compared with known interactions.",
        "Only the strongest links are drawn. Places on a drawing mean nothing but who is linked with whom.",
    ]
    num_more = len(groups) - len(drawn)
    return Page(
        "networks.html.jinja", f"Networks of genes in {networks.path.name}",
        f"{networks.run} links {len(networks.links):,} pairs of genes with similar mean embeddings, in "
        f"{len(groups):,} group{'s' * (len(groups) > 1)} of cells.", findings, {"groups": drawn}, {}, figures=figures,
        notes=[f"{num_more:,} more groups are in {networks.path.name}."] if num_more else [],
    )  # fmt: skip


def _group(networks: Networks, name: str, number: int) -> dict[str, Any]:
    """Return the section of a group: places of the genes with the strongest links, these links, and their table."""
    links = networks.links[networks.links["group"] == name]
    symbol, num_cells = networks.genes["symbol"], networks.genes["n_cells"]
    graph = networkx.Graph()
    for a, b, weight in links[["a", "b", "weight"]].itertuples(index=False):
        if len(graph) + (a not in graph) + (b not in graph) <= MOST_GENES:
            graph.add_edge(a, b, weight=weight)
    places = networkx.spring_layout(graph, seed=0, k=4 / max(len(graph), 1) ** 0.5) if len(graph) else {}
    x_of = {node: round(MARGIN + (WIDTH - 2 * MARGIN) * (place[0] + 1) / 2, 1) for node, place in places.items()}
    y_of = {node: round(MARGIN + (HEIGHT - 2 * MARGIN) * (place[1] + 1) / 2, 1) for node, place in places.items()}
    nodes = [
        {"name": symbol[a], "x": x_of[a], "y": y_of[a], "text": f"{symbol[a]}, {graph.degree[a]} of the links drawn, "
         f"expressed in {num_cells[a]:,} cells"} for a in graph
    ]  # fmt: skip
    lines = [
        {"a": symbol[a], "b": symbol[b], "x1": x_of[a], "y1": y_of[a], "x2": x_of[b], "y2": y_of[b]}
        for a, b in graph.edges
    ]
    rows = [
        {"a": symbol[a], "b": symbol[b], "weight": float(weight)}
        for a, b, weight in links[["a", "b", "weight"]].head(MOST_LINKS).itertuples(index=False)
    ]
    title = "All cells" if name == ALL else name
    return {"id": f"n{number}", "title": title, "nodes": nodes, "lines": lines, "rows": rows, "count": len(links)}
