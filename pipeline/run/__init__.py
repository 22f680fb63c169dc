"""A whole run on one rank: train, test, report, save."""
