"""A run, or several beside each other, as one HTML file that opens offline (docs/report.md)."""
