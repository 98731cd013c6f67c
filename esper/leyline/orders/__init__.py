"""Orders of people to a run that is training: what can be ordered, how an order is signed, and where it lies in RUN."""
