"""Reports: one self-contained HTML page, and plots for it."""

from alimm.report.page import Page, Raw, escape, picture, table
from alimm.report.plots import curves

__all__ = ["Page", "Raw", "curves", "escape", "picture", "table"]
