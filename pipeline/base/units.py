"""Quantities as people read them."""


def mebibytes(count: int) -> str:
    """Write a number of bytes in MiB, without the unit."""
    return f"{count / 2**20:,.0f}" if count >= 10 * 2**20 else f"{count / 2**20:.1f}"
