"""A network as a chain of stages, so that tenants whose first layers are equal can share them.

A stage is a run of layers that begins with one that has tensors. A model is a tuple of stages; two
models whose tensors of a stage are equal hold the *same* stage object, so "same first layers" is a
comparison of identities. The network is built once on the meta device (no memory, no initialisation).
A stage holds its layers' functions with real tensors (``models/layers.py``); a layer without a function is
held as a copy of its module with the tensors put in.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Final

import torch
from torch import nn

from flatshare.errors import ModelFailed
from flatshare.models.architecture import Architecture
from flatshare.models.layers import LayerFunction, does_nothing, function_of
from flatshare_registry.records import TensorRecord

__all__ = ["DTYPES", "Model", "Plan", "Stage", "device_tensor", "plan_of", "tensor_view"]

# The bytes are read-only and so are the parameters (inference only, requires_grad is off):
# nothing can write through them, which is what torch warns about.
warnings.filterwarnings("ignore", message="The given buffer is not writable", category=UserWarning)

DTYPES: Final[dict[str, torch.dtype]] = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "I16": torch.int16, "I32": torch.int32,
    "I64": torch.int64, "F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32,
    "F64": torch.float64, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "U16": torch.uint16, "U32": torch.uint32, "U64": torch.uint64,
}  # fmt: skip
"""safetensors' names of element types."""


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class Stage:
    """A run of layers with their tensors. Equal to itself alone.

    Attributes
    ----------
    steps
        Functions and what each takes besides the rows.
    """

    steps: tuple[tuple[LayerFunction, tuple[torch.Tensor, ...]], ...]

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        """The layers' output for rows; the rows are not changed."""
        for run, tensors in self.steps:
            rows = run(rows, *tensors)
        return rows


@dataclass(frozen=True, slots=True)
class Model:
    """Something that runs: stages, one after the other. Calling it is the plain path, the reference.

    Attributes
    ----------
    stages
        Each is a :class:`Stage`, or anything else that turns rows into rows.
    tensors
        All that the stages hold, by part: what other models with the same tensors share.
    digest
        sha256 of the weights that it was built from, for comparison when it runs.
    architecture
        Its name: models of one have the same layers, and differ in their tensors alone.
    channels_last, threads
        As its architecture says.
    """

    stages: tuple[Callable[[torch.Tensor], torch.Tensor], ...]
    tensors: Mapping[Any, torch.Tensor] = field(default_factory=dict)
    digest: str = ""
    architecture: str = ""
    channels_last: bool = False
    threads: int = 1

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        """Logits ``(N, classes)`` of rows ``(N, *input.shape)``."""
        for stage in self.stages:
            rows = stage(rows)
        return rows

    def layer_tensors(self, stage: int, layer: int) -> Sequence[torch.Tensor]:
        """A layer's own tensors, in the order of its state dict."""
        held = self.stages[stage]
        assert isinstance(held, Stage), "made by a plan"
        run, tensors = held.steps[layer]
        return list(run.state_dict(keep_vars=True).values()) if isinstance(run, nn.Module) else tensors


@dataclass(frozen=True, slots=True)
class _Layer:
    """One layer of a plan: its tensors without data, by their names in the network, and what it computes."""

    module: nn.Module
    blanks: Mapping[str, torch.Tensor]
    run: LayerFunction | None


@dataclass(frozen=True, slots=True)
class Plan:
    """How an architecture falls into stages.

    Attributes
    ----------
    names
        For each stage, the tensors that it holds.
    """

    architecture: str
    names: tuple[tuple[str, ...], ...]
    _stages: tuple[tuple[_Layer, ...], ...]

    def layers(self) -> list[list[tuple[LayerFunction | None, nn.Module]]]:
        """Each stage's layers: as a function of rows and tensors, if there is one, and as a module without
        memory.
        """
        return [[(one.run, one.module) for one in stage] for stage in self._stages]

    def stage(self, index: int, tensors: Mapping[str, torch.Tensor]) -> Stage:
        """A stage with these tensors (by name) put in; nothing is copied.

        Raises
        ------
        ModelFailed
            The network does not take them (it changed since the registration).
        """
        steps: list[tuple[LayerFunction, tuple[torch.Tensor, ...]]] = []
        for layer in self._stages[index]:
            given = tuple(tensors[name] for name in layer.blanks)
            for (name, blank), one in zip(layer.blanks.items(), given, strict=True):
                if one.shape != blank.shape or one.dtype != blank.dtype:
                    raise ModelFailed(f"tensor {name} does not fit architecture {self.architecture} any more")
            if layer.run is not None:
                steps.append((layer.run, given))
            else:
                steps.append((_with_tensors(layer.module, _memo(layer.blanks.values(), given)), ()))
        return Stage(tuple(steps))


def plan_of(network: Architecture) -> Plan:
    """The plan of an architecture; made once a process.

    Raises
    ------
    ModelFailed
        The network has buffers that are not in its state dict: nobody could fill them.
    """
    return _plan(network.name, network.build)


@lru_cache(maxsize=256)
def _plan(name: str, build: Callable[[], nn.Module]) -> Plan:
    with torch.device("meta"):
        module = build()
    module.requires_grad_(False).eval()
    state = {id(tensor) for tensor in module.state_dict(keep_vars=True).values()}
    if any(id(tensor) not in state for tensor in [*module.parameters(), *module.buffers()]):
        raise ModelFailed(f"architecture {name} has buffers that no weights fill (persistent=False)")
    # Not named_children(): it leaves out a module that comes a second time, a shared ReLU say.
    children: list[tuple[str, nn.Module | None]] = []
    if type(module) is nn.Sequential:
        children = list(module._modules.items())
    stages: list[list[_Layer]] = []
    for child_name, child in children:
        if child is None or (does_nothing(child) and len(children) > 1):
            continue
        own = bool(stages) and any(one.blanks for one in stages[0])  # the rows are the network's own by now
        layer = _layer(child, f"{child_name}.", may_overwrite=own)
        if not stages or (layer.blanks and any(one.blanks for one in stages[-1])):
            stages.append([])
        stages[-1].append(layer)
    if not stages:
        stages = [[_Layer(module, module.state_dict(keep_vars=True), None)]]
    names = tuple(tuple(name for layer in stage for name in layer.blanks) for stage in stages)
    return Plan(name, names, tuple(map(tuple, stages)))


def _layer(module: nn.Module, prefix: str, *, may_overwrite: bool) -> _Layer:
    blanks = {f"{prefix}{name}": blank for name, blank in module.state_dict(keep_vars=True).items()}
    return _Layer(module, blanks, function_of(module, may_overwrite=may_overwrite))


def _memo(blanks: Iterable[torch.Tensor], given: Iterable[torch.Tensor]) -> dict[int, torch.Tensor]:
    return {
        id(blank): nn.Parameter(one, requires_grad=False) if isinstance(blank, nn.Parameter) else one
        for blank, one in zip(blanks, given, strict=True)
    }


def _with_tensors(module: nn.Module, tensors: Mapping[int, torch.Tensor]) -> nn.Module:
    """A copy of a module with other tensors, by the ids of its own.

    torch's own layers are copied by hand, in a tenth of deepcopy's time (0.04 ms against 0.45 for the four
    stages of ``mnist-cnn``): all that they hold besides tensors and children are settings. Anything else
    is deep-copied with its tensors already "copied", so that whatever it refers to comes along.
    """
    if not type(module).__module__.startswith("torch.nn.modules.") or module._forward_hooks:
        return copy.deepcopy(module, dict(tensors))
    made = type(module).__new__(type(module))
    made.__dict__.update(module.__dict__)
    made.__dict__["_parameters"] = _replaced(module._parameters, tensors)
    made.__dict__["_buffers"] = _replaced(module._buffers, tensors)
    made.__dict__["_modules"] = {
        name: None if child is None else _with_tensors(child, tensors)
        for name, child in module._modules.items()
    }
    return made


def _replaced(
    own: Mapping[str, torch.Tensor | None], tensors: Mapping[int, torch.Tensor]
) -> dict[str, torch.Tensor | None]:
    return {name: None if one is None else tensors[id(one)] for name, one in own.items()}


def tensor_view(data: memoryview, tensor: TensorRecord) -> torch.Tensor:
    """A tensor over bytes that must not change while it lives; no copy.

    Parameters
    ----------
    data
        Exactly the bytes of the tensor.
    """
    dtype = DTYPES[tensor.dtype]
    if not tensor.size_bytes:
        return torch.empty(tensor.shape, dtype=dtype)
    return torch.frombuffer(data, dtype=dtype).reshape(tensor.shape)


def device_tensor(tensor: torch.Tensor, *, channels_last: bool) -> torch.Tensor:
    """A tensor in the memory order in which it runs: a copy for convolutions that ask for it, else itself."""
    if channels_last and tensor.dim() == 4:
        return tensor.contiguous(memory_format=torch.channels_last)
    return tensor
