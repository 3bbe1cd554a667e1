"""Opening the channels between ranks before the first message counts, and closing them after the last.

Decides that both are done one after the other, in the one order of all ranks: NCCL holds a rank up at its first call on a
channel, and when it destroys one, until the other end has come to it too, so that ranks which began with different channels
would wait for each other.
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

    group: dist.ProcessGroup

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


def disconnect(channels: Iterable[tuple[int, Channel]]) -> None:
    """Let go of the process groups of channels on which nothing is under way.

    Args:
        channels: as `connect` takes them.
    Collectives: with NCCL destroying a group waits for its other rank.
    """
    for _, channel in channels:
        dist.destroy_process_group(channel.group)
