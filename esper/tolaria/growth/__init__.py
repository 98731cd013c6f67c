"""Makes the model follow the agreed state: births, parameters, optimizer, wrapper."""
