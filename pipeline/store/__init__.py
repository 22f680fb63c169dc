"""What a run leaves on the disk: checkpoints, resuming, exports, the run directory and its records."""
