"""`esper watch`: a run, live or finished, in a terminal."""
