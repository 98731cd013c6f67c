"""What is done with Esper beside training: starting a project, measuring a trained network, asking it."""
