"""A pass that never ends: a network of our own, put before a platform's processes as a plug-in.

Its first pass after :meth:`Wedge.arm` sleeps in its thread for ever.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

import torch
from safetensors.torch import save

from flatshare_registry import Registry, TenantId
from flatshare_registry.weights import TensorSpec

__all__ = ["Wedge"]

PLUG_IN: Final = """
import os, time
from torch import nn
from flatshare.models.architecture import Architecture, InputSpec
from flatshare_registry.weights import TensorSpec

class Wedge(nn.Module):
    def forward(self, rows):
        try:
            os.unlink({armed!r})  # of two replicas one gets it
        except FileNotFoundError:
            return rows
        while True:
            time.sleep(3600)

ARCHITECTURE = Architecture(
    name="wedge", input=InputSpec("image", (4,)), classes=2, preprocess=lambda pixels: pixels.astype("float32"), tensors={{"1.weight": TensorSpec("F32", (2, 4))}},
    build=lambda: nn.Sequential(Wedge(), nn.Linear(4, 2, bias=False)).eval(),
)
"""


class Wedge:
    """A tenant whose next pass hangs, once armed.

    Parameters
    ----------
    folder
        Of the plug-in; must be before the platform's processes, by ``PYTHONPATH``.
    """

    tenant: Final = TenantId("wedge")

    def __init__(self, folder: Path) -> None:
        self._armed = folder / "armed"
        (folder / "chaos_wedge.py").write_text(PLUG_IN.format(armed=str(self._armed)))
        info = folder / "chaos_wedge-1.dist-info"
        info.mkdir()
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: chaos-wedge\nVersion: 1\n")
        (info / "entry_points.txt").write_text(
            "[flatshare.architectures]\nwedge = chaos_wedge:ARCHITECTURE\n"
        )
        paths = [str(folder), *filter(None, [os.environ.get("PYTHONPATH")])]
        os.environ["PYTHONPATH"] = os.pathsep.join(paths)

    def register(self, registry: Registry) -> None:
        """Its model."""
        registry.create_tenant(self.tenant)
        weights = save({"1.weight": torch.ones(2, 4)})
        registry.register(self.tenant, weights, "wedge", {"1.weight": TensorSpec("F32", (2, 4))})

    def arm(self) -> None:
        """Have its next pass hang."""
        self._armed.touch()

    @property
    def is_armed(self) -> bool:
        """Whether no pass has hung since."""
        return self._armed.exists()
