"""Hosts in training as a policy learns from them, by the run's own engine; see `esper.leyline.protocols.Trials`."""
