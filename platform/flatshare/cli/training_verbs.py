"""Verbs that make weights: train base, train tenant, digits, handwritings, convert."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Annotated, Any

import typer

from flatshare.cli.context import (
    StoreOption,
    Told,
    UrlOption,
    need_mnist,
    need_serve_extra,
    probe_of,
    registry_for_change,
    tell_replicas,
)
from flatshare.cli.output import AsJson, err, out, print_json, print_table, printable, progress_bar, size
from flatshare_registry.errors import InvalidInput
from flatshare_registry.ids import TenantId

train_app = typer.Typer(help="Train the demo's models on real MNIST.", no_args_is_help=True)

ArchitectureOption = Annotated[str, typer.Option("--architecture", "-a")]
DataOption = Annotated[
    Path | None,
    typer.Option(
        "--data",
        help="Folder with the four MNIST files; by default the shipped 10,000 digits, split 8,000/2,000.",
    ),
]
DownloadOption = Annotated[
    Path | None, typer.Option("--download", help="Download the full set into this folder and use it.")
]
OutOption = Annotated[Path, typer.Option("--out", help="Where to write the safetensors file.")]


def add_to(app: typer.Typer) -> None:
    """Add these verbs to the command."""
    app.add_typer(train_app, name="train", rich_help_panel="Models")
    app.command(rich_help_panel="Models")(convert)


def _digits(data: Path | None, download: Path | None) -> Any:
    from flatshare.mnist.digits import download as fetch
    from flatshare.mnist.digits import load_digits

    if data is not None and download is not None:
        raise InvalidInput("give --data or --download, not both")
    return load_digits(fetch(download) if download is not None else data)


def _write(path: Path, data: bytes) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    except OSError as error:
        raise InvalidInput(f"{path} can't be written: {error.strerror}") from error


@train_app.command("base")
def train_base(
    out_file: OutOption = Path("base.safetensors"),
    architecture_name: ArchitectureOption = "mnist-cnn",
    epochs: Annotated[int, typer.Option(min=1)] = 3,
    data: DataOption = None,
    download: DownloadOption = None,
    as_json: AsJson = False,
) -> None:
    """Train the base model that tenants are fine-tuned from."""
    need_mnist()
    from flatshare.mnist import train
    from flatshare.models.architecture import architecture

    network = architecture(architecture_name)
    digits = _digits(data, download)
    with progress_bar(f"base {network.name}") as progress:
        weights, accuracy = train.train_base(network, digits, epochs=epochs, progress=progress)
    _write(out_file, weights)
    if as_json:
        print_json({"file": str(out_file), "accuracy": accuracy})
    else:
        out.print(
            f"{out_file}: {size(len(weights))}, {accuracy:.2%} of {len(digits.test_labels)} test digits right"
        )


@train_app.command("tenant")
def train_tenant(
    tenant: Annotated[str, typer.Argument(metavar="TENANT")],
    handwriting_name: Annotated[
        str, typer.Option("--handwriting", "-w", help="See `flatshare train handwritings`.")
    ],
    base: Annotated[Path, typer.Option(help="The base model.")] = Path("base.safetensors"),
    out_file: Annotated[
        Path | None, typer.Option("--out", help="Where to write it.", show_default="TENANT.safetensors")
    ] = None,
    architecture_name: ArchitectureOption = "mnist-cnn",
    epochs: Annotated[int, typer.Option(min=1)] = 1,
    seed: Annotated[int, typer.Option(min=0, help="Another seed trains another version.")] = 0,
    data: DataOption = None,
    download: DownloadOption = None,
    register: Annotated[
        bool, typer.Option("--register", help="Also register it (creates the tenant).")
    ] = False,
    store: StoreOption = None,
    url: UrlOption = None,
    as_json: AsJson = False,
) -> None:
    """Fine-tune the base model on one customer's handwriting; prints base and own accuracy."""
    need_mnist()
    from flatshare.mnist import train
    from flatshare.mnist.handwriting import handwriting
    from flatshare.models.architecture import architecture

    parsed = TenantId(tenant)
    network, writing = architecture(architecture_name), handwriting(handwriting_name)
    registry = registry_for_change(store, url) if register else None
    if not base.exists():
        raise InvalidInput(f"{base} does not exist; make it with: flatshare train base --out {base}")
    digits = _digits(data, download)
    with progress_bar(f"{parsed} ({writing.name})") as progress:
        trained = train.fine_tune(
            network,
            train.load_module(network, base),
            digits,
            writing,
            epochs=epochs,
            seed=seed,
            progress=progress,
        )
    path = out_file or Path(f"{parsed}.safetensors")
    _write(path, trained.weights)
    document: dict[str, Any] = {
        "tenant": str(parsed),
        "handwriting": writing.name,
        "file": str(path),
        "base_accuracy": trained.base_accuracy,
        "own_accuracy": trained.own_accuracy,
    }
    registered, told = "", Told("")
    if registry is not None:
        notes = {
            "handwriting": writing.name,
            "own_accuracy": f"{trained.own_accuracy:.4f}",
            "seed": str(seed),
        }
        done = registry.register(
            parsed, trained.weights, network.name, network.tensors,
            metadata=notes, probe=probe_of(network), create=True,
        )  # fmt: skip
        document["version"] = done.version.version
        told = tell_replicas(registry, parsed, url)
        registered = f"; registered as {done.version.name}; {told}"
    if as_json:
        print_json(document)
    else:
        out.print(
            f"{parsed} ({writing.about}): base {trained.base_accuracy:.2%}, own {trained.own_accuracy:.2%} "
            f"of {len(digits.test_labels)} held-out digits; {path}{registered}",
            soft_wrap=True,
        )
    told.check()


@train_app.command("digits")
def train_digits(
    handwriting_name: Annotated[
        str, typer.Option("--handwriting", "-w", help="A customer's handwriting; by default unchanged.")
    ] = "",
    count: Annotated[int, typer.Option(min=1, max=2000)] = 2,
    out_folder: Annotated[Path, typer.Option("--out", help="Folder for the files.")] = Path("digits"),
    data: DataOption = None,
    as_json: AsJson = False,
) -> None:
    """Write some of the digits that nothing was trained on as PNG files, for `predict` and /classify."""
    need_mnist()
    from PIL import Image

    from flatshare.mnist.handwriting import handwriting

    digits = _digits(data, None)
    # One of each in turn: 0.png is a zero, 1.png a one, 10.png a zero again.
    seen: Counter[int] = Counter()
    turns: list[tuple[int, int]] = []
    for label in digits.test_labels.tolist():
        seen[label] += 1
        turns.append((seen[label], label))
    chosen = sorted(range(len(turns)), key=turns.__getitem__)[:count]
    images, labels = digits.test_images[chosen], digits.test_labels[chosen]
    if handwriting_name:
        images, labels = handwriting(handwriting_name).apply(images, labels)
    written: dict[str, int] = {}
    try:
        out_folder.mkdir(parents=True, exist_ok=True)
        for number, (image, label) in enumerate(zip(images, labels, strict=True)):
            path = out_folder / f"{number}.png"
            Image.fromarray(image).save(path)
            written[str(path)] = int(label)
    except OSError as error:
        raise InvalidInput(f"{out_folder} can't be written: {error.strerror}") from error
    if as_json:
        print_json({"files": written})
    else:
        print_table("", ["file", "digit"], list(written.items()))


@train_app.command("handwritings")
def handwritings(as_json: AsJson = False) -> None:
    """List the handwritings that tenants can have."""
    need_mnist()
    from flatshare.mnist.handwriting import HANDWRITINGS

    if as_json:
        print_json([{"name": one.name, "about": one.about} for one in HANDWRITINGS.values()])
        return
    print_table("", ["handwriting", "about"], [(one.name, one.about) for one in HANDWRITINGS.values()])


def convert(
    file: Annotated[Path, typer.Argument(help="TorchScript model.pt or a state_dict checkpoint.")],
    out_file: Annotated[Path, typer.Argument(metavar="OUT", help="The safetensors file to write.")],
    architecture_name: ArchitectureOption = "mnist-cnn",
    trust_torchscript: Annotated[
        bool, typer.Option("--trust-torchscript", help="Load TorchScript, which can run its author's code.")
    ] = False,
) -> None:
    """Convert TorchScript or a checkpoint to safetensors, on this machine."""
    need_serve_extra()
    from flatshare.models.architecture import architecture
    from flatshare.models.convert import TORCHSCRIPT_WARNING, is_torchscript, to_safetensors

    if trust_torchscript and is_torchscript(file):
        err.print("warning:", style="yellow", end=" ")
        err.print(TORCHSCRIPT_WARNING, soft_wrap=True)
    notes: list[str] = []
    data = to_safetensors(
        file, architecture(architecture_name), trust_torchscript=trust_torchscript, note=notes.append
    )
    _write(out_file, data)
    out.print(f"{out_file}: {size(len(data))}, a {architecture_name}")
    for note in notes:
        out.print(printable(note), soft_wrap=True)
