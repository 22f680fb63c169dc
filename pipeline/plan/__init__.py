"""Who owns what, and what it would cost: cut, assembly, placement, measurement, simulation."""
