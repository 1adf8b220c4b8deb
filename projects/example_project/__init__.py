"""The smallest complete plugin: one hook. Importing this registers it and does no other work."""

from alimm.projects.example_project.class_coverage_hook import ClassCoverageHook
from alimm.projects.example_project.toy_dataset import ColouredSquares

__all__ = ["ClassCoverageHook", "ColouredSquares"]
