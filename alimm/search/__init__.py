"""Nearest neighbours: the protocol of an index, exact search, and how to judge an approximate one."""

from alimm.search.exact import ExactIndex
from alimm.search.index import Index, check_vectors
from alimm.search.recall import recall_at_k

__all__ = ["ExactIndex", "Index", "check_vectors", "recall_at_k"]
