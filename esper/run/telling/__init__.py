"""What a rank tells of itself while it runs, and where that goes."""
