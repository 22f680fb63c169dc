"""How many images a second a loader could give, beside those that the first stage takes."""

from __future__ import annotations


class LoaderRate:
    """Images of an epoch so far, and the seconds that making them took: not those in which they waited to be used."""

    def __init__(self) -> None:
        self._images = 0
        self._seconds = 0.0

    def begin(self) -> None:
        """Of a new epoch."""
        self._images, self._seconds = 0, 0.0

    def add(self, images: int, seconds: float) -> None:
        """``images`` took so long; of several workers side by side, their share of it."""
        self._images += images
        self._seconds += seconds

    @property
    def images_per_s(self) -> float | None:
        """None where nothing was measured, as of a user's loader with workers, which keep their times to themselves."""
        return self._images / self._seconds if self._seconds > 0 else None
