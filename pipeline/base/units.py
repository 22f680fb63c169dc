"""Quantities as people read them."""


def mebibytes(count: int) -> str:
    """Write a number of bytes in MiB, without the unit."""
    return f"{count / 2**20:,.0f}" if count >= 10 * 2**20 else f"{count / 2**20:.1f}"


def rate(per_s: float | None) -> str:
    """Write a number per second, without the unit; two digits of a small one, so that what is slow is not 0; "-" where
    nothing was measured."""
    if per_s is None:
        return "-"
    return f"{per_s:,.0f}" if per_s >= 10 or per_s == 0 else f"{per_s:.2g}"
