"""What everything stands on: errors, version, configuration, numerics."""
