"""What a stage asks of the edges to its neighbours, so that something else can stand in for them.

    stage r-1  <-- gradient_out --  stage r  -- activation_out -->  stage r+1
               <-- weights_out --            <-- gradient_in ----
                                             <-- weights_in -----
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from pipeline.base.flow import Tensors
from pipeline.edges.wire import Header, MessageKind


class Outgoing(Protocol):
    """A sending end, as of :class:`pipeline.edges.transport.Sender`."""

    @property
    def wait_s(self) -> float:
        """Seconds that ``send`` has waited."""

    def send(self, header: Header, **tensors: Tensor) -> None:
        """Send one message."""


class Taken(Protocol):
    """A message, as of :class:`pipeline.edges.transport.Received`."""

    @property
    def fields(self) -> Tensors:
        """Valid until ``release``."""

    def release(self) -> None:
        """Give the buffer back."""


class Incoming(Protocol):
    """A receiving end, as of :class:`pipeline.edges.transport.Receiver`."""

    @property
    def wait_s(self) -> float:
        """Seconds that ``take`` has waited."""

    def take(self, kind: MessageKind, /, epoch: int, step: int, micro_batch: int, key: int = 0) -> Taken:
        """The next message, which must be this one."""


class Neighbours(Protocol):
    """The ends of the edges of one rank, as of :class:`pipeline.edges.connect.Edges`; its input comes by an inlet."""

    @property
    def activation_out(self) -> Outgoing | None:
        """To the next stage."""

    @property
    def gradient_in(self) -> Incoming | None:
        """From the next stage."""

    @property
    def gradient_out(self) -> Outgoing | None:
        """To the previous stage."""

    @property
    def weights_in(self) -> Incoming | None:
        """From the next stage, where the method declares weights upstream."""

    @property
    def weights_out(self) -> Outgoing | None:
        """To the previous stage, likewise."""
