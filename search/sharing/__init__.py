"""How many trials share a device, measured."""
