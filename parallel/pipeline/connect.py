"""Opening the channels between ranks before the first message counts.

Decides that they are opened one after the other, in the one order of all ranks: NCCL holds a rank up at its first call on a
channel until the other end has come to it too, so that ranks which began with different channels would wait for each other.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from parallel.mesh import Mesh


class Channel(Protocol):
    """An end of a directed edge."""

    def start(self, tensor: Tensor, /) -> dist.Work:
        """Start sending a contiguous tensor, or receiving into it."""


def connect(channels: Iterable[tuple[int, Channel]], mesh: Mesh) -> None:
    """Send one element over every channel, so that no connection is made inside a step.

    Args:
        channels: this rank's, in the order in which all ranks have made them, each with the world rank of its other end.
    Collectives: messages over these channels.
    """
    works = []
    for other, channel in channels:
        with mesh.activity.waiting("a connection", (other,)):
            works.append((other, channel.start(torch.zeros(1, device=mesh.device))))
    for other, work in works:
        with mesh.activity.waiting("a connection", (other,)):
            work.wait()
