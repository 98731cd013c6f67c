"""Slots: the places in a host where seeds live, and what a slot computes in the host's forward."""
