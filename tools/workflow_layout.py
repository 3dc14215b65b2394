"""Places the nodes of a workflow: columns from left to right, the frames of groups, and long links above the nodes.

Nodes and links are those of a UI workflow; columns are lists of nodes by number.
"""

from __future__ import annotations

from collections.abc import Sequence

from workflow_format import TITLE_HEIGHT

GAP = 24
GROUP_PADDING = 12
GROUP_TITLE = 40
COLUMN_GAP = 34
"""Between the columns of a group; between groups their frames' edges are added."""
LANE = 16
"""Height of one link above the nodes."""

Columns = dict[int, list[dict]]
LongLinks = dict[tuple[int, int], list[list]]


def long_links(columns: Columns, links: Sequence[list]) -> LongLinks:
    """The links that pass over a column, by their output (node, slot), in the order in which they were made."""
    order = sorted(columns)
    place_of = {node["id"]: order.index(column) for column, nodes in columns.items() for node in nodes}
    passing: LongLinks = {}
    for link in links:
        _, source, slot, target, *_ = link
        if place_of[target] - place_of[source] > 1:
            passing.setdefault((source, slot), []).append(link)
    return passing


def place(columns: Columns, groups: Sequence[Sequence[int]] = (), above: int = 0) -> list[list[float]]:
    """Puts every column to the right of the one before, and every node below the one above it.

    Args:
        columns: their nodes get their places.
        groups: the neighboring columns of each group.
        above: number of long links for which there is room above all nodes.

    Returns:
        The groups' frames [x, y, width, height].
    """
    left, edges, bottom, last = 0.0, {}, 0.0, None
    for column in sorted(columns):
        frame = next((i for i, members in enumerate(groups) if column in members), None)
        if edges:
            left += COLUMN_GAP + (2 * GROUP_PADDING if frame != last or frame is None else 0)
        last, top = frame, float(LANE * above + TITLE_HEIGHT)
        for node in columns[column]:
            node["pos"] = [left, top]
            top += node["size"][1] + GAP + TITLE_HEIGHT
        width = max(node["size"][0] for node in columns[column])
        edges[column] = left, left + width
        left, bottom = left + width, max(bottom, top - GAP - TITLE_HEIGHT)
    top = -GROUP_TITLE - GROUP_PADDING
    frames = []
    for members in groups:
        a, b = (edges[members[end]][end] for end in (0, -1))
        frames.append([a - GROUP_PADDING, top, b - a + 2 * GROUP_PADDING, bottom + GROUP_PADDING - top])
    return frames


def lanes(nodes: Sequence[dict], passing: LongLinks) -> tuple[list[dict], list[dict]]:
    """Reroutes that lead long links above placed nodes, one way for all links of an output, and what ties the links to
    them."""
    reroutes, extensions = [], []
    by_number = {node["id"]: node for node in nodes}
    for lane, ((source, _), links) in enumerate(passing.items()):
        y = LANE * (lane + 0.5) - GROUP_PADDING
        node = by_number[source]
        start = {
            "id": len(reroutes) + 1,
            "pos": [node["pos"][0] + node["size"][0] + COLUMN_GAP / 2, y],
            "linkIds": [link[0] for link in links],
        }
        reroutes.append(start)
        # Each link goes down before its node, where the nearest ones leave the way first.
        before, stops = start, {}
        for link in sorted(links, key=lambda link: by_number[link[3]]["pos"][0]):
            x = by_number[link[3]]["pos"][0] - COLUMN_GAP / 2
            if x not in stops:
                stops[x] = {"id": len(reroutes) + 1, "parentId": before["id"], "pos": [x, y], "linkIds": []}
                reroutes.append(stops[x])
                before = stops[x]
            for stop in stops.values():
                stop["linkIds"].append(link[0])
            extensions.append({"id": link[0], "parentId": stops[x]["id"]})
    return reroutes, extensions
