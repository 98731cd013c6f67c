"""The store: which runs lie below a folder, what each came to, and SQL over all of their events (docs/store.md)."""
