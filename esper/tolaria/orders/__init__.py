"""People's orders to a run in training: judged, written down, and handed to the ticks; all of it on rank 0."""
