"""Graphs of nearest neighbours: building their lists, storing edges by shard, choosing the active classes of a batch.

Importing this package imports none of its modules.
"""
