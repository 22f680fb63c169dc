"""What does the user type? ``train``, ``plan``, ``evaluate``, ``export``, ``compare``, ``doctor``: as ``python
launch/NAME.py`` in a clone, as ``localpipe NAME`` or ``python -m pipeline NAME`` wherever the package is installed."""
