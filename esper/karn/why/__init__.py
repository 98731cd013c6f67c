"""Why: what a run did and how it ended, in plain sentences, each with the events that it stands on (docs/why.md)."""
