"""What trainers and wrappers put around a ``state_dict``, and how it comes off again."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any, Final

import torch

from flatshare.models.architecture import Architecture
from flatshare.models.stages import DTYPES
from flatshare_registry.errors import InvalidWeights

__all__ = ["find_state", "in_dtypes_of", "without_wrappers"]

Note = Callable[[str], None]

_KEYS: Final = ("state_dict", "model_state_dict", "model", "module")
"""Keys under which trainers keep the weights: Lightning, the tutorials, timm, DeepSpeed."""

_PREFIXES: Final = ("module.", "_orig_mod.", "model.")
"""What wrappers put in front of every name: DataParallel, torch.compile, Lightning."""

_SEGMENTS: Final = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module")
"""The same for a wrapped part of a network; nobody gives such a name to a part of a network."""

_NAMES: Final = {dtype: name for name, dtype in DTYPES.items()}

_SHOWN: Final = 6


def find_state(loaded: object, what: str) -> dict[str, torch.Tensor]:
    """The tensors by name in what a checkpoint holds, however deep under the usual keys.

    Raises
    ------
    InvalidWeights
        They are not there; the message shows what is.
    """
    while isinstance(loaded, Mapping):
        inner = next((loaded[key] for key in _KEYS if isinstance(loaded.get(key), Mapping)), None)
        if inner is None:
            break
        loaded = inner
    if not isinstance(loaded, Mapping) or not loaded:
        raise InvalidWeights(f"{what} holds no state_dict, but {_kind(loaded)}")
    bad = {str(name): value for name, value in loaded.items() if not isinstance(value, torch.Tensor)}
    if bad:
        shown = ", ".join(f"{name[:80]!a} ({_kind(value)})" for name, value in list(bad.items())[:_SHOWN])
        more = f" and {len(bad) - _SHOWN} more" if len(bad) > _SHOWN else ""
        raise InvalidWeights(
            f"{what} holds things that are no tensors: {shown}{more}; "
            f"weights are looked for at the top, and under {', '.join(_KEYS)}"
        )
    return {str(name): value for name, value in loaded.items()}


def without_wrappers(
    state: dict[str, torch.Tensor], wanted: Collection[str], note: Note
) -> dict[str, torch.Tensor]:
    """Tensors by the wanted names, if only wrappers' names are in the way.

    Otherwise returns those of the unwrapping step that has most of the wanted names, to be shown.
    """
    wanted = set(wanted)
    best, best_taken, now, taken = state, "", state, ""
    while set(now) != wanted:
        step = _peeled(now)
        if step is None:
            break
        now, layer = step
        taken += layer
        if len(wanted & set(now)) > len(wanted & set(best)):
            best, best_taken = now, taken
    if best_taken:
        note(f"took {best_taken.removesuffix('.')!r} off the names")
    return best


def _peeled(state: dict[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], str] | None:
    """The names without one layer of wrapping, and that layer; None when there is none to take off."""
    for prefix in _PREFIXES:
        names = {name: name.removeprefix(prefix) for name in state}
        if _is_good(state, names):
            return {names[name]: tensor for name, tensor in state.items()}, prefix
    for segment in _SEGMENTS:
        names = {name: ".".join(part for part in name.split(".") if part != segment) for name in state}
        if _is_good(state, names):
            return {names[name]: tensor for name, tensor in state.items()}, f"{segment}."
    return None


def _is_good(state: Collection[str], names: Mapping[str, str]) -> bool:
    """Whether the new names change something, and no two names become the same."""
    return any(names[name] != name for name in state) and len(set(names.values())) == len(state)


def in_dtypes_of(
    network: Architecture, state: dict[str, torch.Tensor], note: Note
) -> dict[str, torch.Tensor]:
    """Plain tensors, in the architecture's dtypes where they have its names.

    Raises
    ------
    InvalidWeights
        A tensor holds no plain numbers, or some that its dtype can't hold.
    """
    made: dict[str, torch.Tensor] = {}
    changed: dict[tuple[str, str], int] = {}
    for name, tensor in state.items():
        if tensor.layout is not torch.strided or tensor.device.type != "cpu" or tensor.dtype not in _NAMES:
            what = f"{tensor.dtype}, {tensor.layout}, on {tensor.device}".replace("torch.", "")
            raise InvalidWeights(f"{name[:80]!a} holds no plain numbers: {what}")
        spec = network.tensors.get(name)
        found = _NAMES[tensor.dtype]
        if spec is not None and spec.dtype != found and spec.dtype in DTYPES:
            tensor = _cast(name, tensor, spec.dtype)
            changed[found, spec.dtype] = changed.get((found, spec.dtype), 0) + 1
        # clone: tensors that share memory can't be saved as safetensors.
        made[name] = tensor.detach().contiguous().clone()
    for (found, now), count in changed.items():
        note(f"{count} tensors were {found} and are {now} now, as {network.name} has them")
    return made


def _cast(name: str, tensor: torch.Tensor, dtype: str) -> torch.Tensor:
    cast = tensor.to(DTYPES[dtype])
    if tensor.is_floating_point() and cast.is_floating_point():
        # The tensor's own infinities are allowed. As doubles, since not every type can be checked.
        fits = bool((cast.double().isfinite() | ~tensor.double().isfinite()).all())
    else:
        fits = torch.equal(cast.to(tensor.dtype), tensor)
    if not fits:
        raise InvalidWeights(f"{name[:80]!a} holds numbers that {dtype} can't: it is {_NAMES[tensor.dtype]}")
    return cast


def _kind(value: Any) -> str:
    """What a thing in a checkpoint is, in few words and without its content."""
    if isinstance(value, Mapping):
        names = ", ".join(f"{str(name)[:80]!a}" for name in list(value)[:_SHOWN])
        return f"a dict of {names}{', ...' if len(value) > _SHOWN else ''}" if value else "an empty dict"
    return type(value).__name__
