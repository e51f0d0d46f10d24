"""Graphs of what was measured: tables of nodes and edges, an offline page, Graphistry."""

from .graph import Graph

__all__ = ["Graph"]
