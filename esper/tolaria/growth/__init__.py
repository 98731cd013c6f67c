"""How the model follows the agreed state: births, parameters, optimizer, wrapper."""
