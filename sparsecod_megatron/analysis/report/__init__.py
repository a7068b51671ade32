"""The report: one HTML page that holds the data, the code and the styles it needs, and works without a network."""

from sparsecod_megatron.analysis.report.page import report_page, write_report

__all__ = ["report_page", "write_report"]
