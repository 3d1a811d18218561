"""Which rank is on which node, and which nodes exchange data in which round."""

from dataclasses import dataclass

MAX_ROUNDS = 8
"""Rounds in which pairs of nodes meet: each of up to 8 nodes meets all others, else 8 others."""


@dataclass(frozen=True, slots=True)
class Places:
    """The node of every rank."""

    nodes_by_rank: tuple[str, ...]

    @property
    def nodes(self) -> list[str]:
        """The nodes, in the order of their first ranks."""
        return list(dict.fromkeys(self.nodes_by_rank))

    def ranks_of(self, node: str) -> list[int]:
        """Return the ranks of a node."""
        return [rank for rank, each in enumerate(self.nodes_by_rank) if each == node]

    def is_first(self, rank: int) -> bool:
        """Return whether a rank is the first one of its node."""
        return self.ranks_of(self.nodes_by_rank[rank])[0] == rank

    def partners_of(self, rank: int) -> list[int | None]:
        """Return the rank of another node that `rank` meets in each round; None: nobody."""
        node = self.nodes_by_rank[rank]
        place = self.ranks_of(node).index(rank)
        partners: list[int | None] = []
        for pairs in pair_up(len(self.nodes)):
            others = [
                self.nodes[right if self.nodes[left] == node else left]
                for left, right in pairs
                if node in (self.nodes[left], self.nodes[right])
            ]
            ranks = self.ranks_of(others[0]) if others else []
            partners.append(ranks[place] if place < len(ranks) else None)
        return partners


def pair_up(num_nodes: int) -> list[list[tuple[int, int]]]:
    """Pair the nodes in rounds: in a round each node is in one pair at most, no pair comes twice.

    The circle method of round-robin tournaments: one node stays, the others move on by one place.

    Returns:
        Per round, up to `MAX_ROUNDS`, the pairs of node numbers, the lower one first.
    """
    if num_nodes < 2:
        return []
    seats = num_nodes + num_nodes % 2  # an odd number of nodes: one of them pauses
    rounds = []
    for turn in range(min(seats - 1, MAX_ROUNDS)):
        circle = [seats - 1] + [(turn + place) % (seats - 1) for place in range(seats - 1)]
        pairs = [(circle[place], circle[seats - 1 - place]) for place in range(seats // 2)]
        rounds.append([(min(p), max(p)) for p in pairs if max(p) < num_nodes])
    return rounds
