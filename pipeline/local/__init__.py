"""One gradient-isolated local module: its role, its method, its step, its state."""
