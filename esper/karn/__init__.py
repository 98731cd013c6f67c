"""Evaluation of several runs: records, statistics, tables and a page."""
