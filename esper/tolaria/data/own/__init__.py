"""Data of the user's own: data sets, tables, files of tokens, and reading ahead."""
