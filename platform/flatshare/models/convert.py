"""Convert what people have (TorchScript, a checkpoint) to safetensors, on their own machine.

The platform itself never unpickles anything. TorchScript archives hold code, so reading one means
trusting whoever made it; the command says so before it does.
"""

from __future__ import annotations

import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Final

import torch
from safetensors.torch import save

from flatshare.models.architecture import Architecture
from flatshare.models.checkpoints import find_state, in_dtypes_of, without_wrappers
from flatshare_registry.errors import InvalidWeights
from flatshare_registry.weights import check_architecture, describe

__all__ = ["TORCHSCRIPT_WARNING", "is_torchscript", "to_safetensors"]

TORCHSCRIPT_WARNING: Final = (
    "TorchScript files hold code. Loading one can run whatever its author put there: do this only "
    "with files that you trust, on a machine that you can afford to lose."
)


def is_torchscript(path: Path) -> bool:
    """Whether a file is a TorchScript archive; looks, loads nothing.

    Raises
    ------
    InvalidWeights
        It can't be read.
    """
    try:
        if not zipfile.is_zipfile(path):
            return False
        with zipfile.ZipFile(path) as archive:
            return any("/code/" in name or name.endswith("constants.pkl") for name in archive.namelist())
    except (OSError, zipfile.BadZipFile) as error:
        raise InvalidWeights(f"{path} can't be read: {error}") from error


def to_safetensors(
    path: Path,
    network: Architecture,
    *,
    trust_torchscript: bool = False,
    note: Callable[[str], None] = lambda text: None,
) -> bytes:
    """Weights of a file as a safetensors file of an architecture.

    Names lose what wrappers put around them, and numbers of another dtype get the architecture's.

    Parameters
    ----------
    path
        A ``state_dict`` checkpoint (loaded with ``weights_only=True``), bare or under the keys that trainers
        use; or a TorchScript archive.
    trust_torchscript
        Whether a TorchScript archive may be loaded.
    note
        Told what was changed.

    Raises
    ------
    InvalidWeights
        Not such a file, not trusted, not of this architecture, or with numbers that its dtype can't hold.
    """
    state = _torchscript_state(path, trust_torchscript) if is_torchscript(path) else _checkpoint_state(path)
    state = without_wrappers(state, network.tensors, note)
    data: bytes = save(in_dtypes_of(network, state, note))
    check_architecture(describe(data).tensors, network.name, network.tensors)
    return data


def _torchscript_state(path: Path, trusted: bool) -> dict[str, torch.Tensor]:
    if not trusted:
        raise InvalidWeights(
            f"{path} is TorchScript. {TORCHSCRIPT_WARNING} Say --trust-torchscript to go on."
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # that it is deprecated is why this command exists
            module = torch.jit.load(str(path), map_location="cpu")  # type: ignore[no-untyped-call]  # torch gives it no types
    except (RuntimeError, ValueError, OSError) as error:
        raise InvalidWeights(f"{path} can't be loaded as TorchScript: {_first_line(error)}") from error
    return dict(module.state_dict())


def _checkpoint_state(path: Path) -> dict[str, torch.Tensor]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # what matters is an error, and said in our words
            loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises pickle, zip, EOF, runtime and key errors for bad files
        raise InvalidWeights(
            f"{path} can't be loaded as a checkpoint of plain tensors: {_first_line(error)}"
        ) from error
    return find_state(loaded, str(path))


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
