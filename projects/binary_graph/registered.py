"""What the registries of alimm know of this project."""

from alimm.projects.binary_graph.hash_head import HashHead
from alimm.projects.binary_graph.index import BinaryGraphIndex

__all__ = ["BinaryGraphIndex", "HashHead"]
