"""Numbers in; tables, a figure and one HTML page out."""

from __future__ import annotations

from dk2pnet.report.page import write_page
from dk2pnet.report.tables import comparison_rows, format_count, layer_rows, markdown_table, rich_table

__all__ = ["comparison_rows", "format_count", "layer_rows", "markdown_table", "rich_table", "write_page"]
