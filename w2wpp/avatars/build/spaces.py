"""The spaces that the evaluation compares, and the two that ship."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ...basis import AffineBasis
from ...errors import ConfigError
from ...space import Space
from ...spacefile import extras, load_space, same_coordinates, save_space
from ...training.coefficients import project_dataset
from ...training.config import VaeTraining, original_training
from ...training.dataset import VectorDataset, write_dataset
from ...training.fit_basis import fit_basis
from ...training.fit_vae import fit_vae, linear_space
from ..world.renderer import TRAITS

COMPONENTS = 256
PCA_SIZES = {f"pca-{size}": size for size in (16, 32, 64, 128, 256)}
VAES = {
    "skip-32": VaeTraining(codec="vae-skip", latent=32, beta=0.03),
    "skip-64": VaeTraining(codec="vae-skip", latent=64, beta=0.03),
    "skip-128": VaeTraining(codec="vae-skip", latent=128, beta=0.03),
    "mlp-64": VaeTraining(codec="vae-mlp", latent=64, beta=0.03),
}
DEFAULT, LINEAR = "skip-128", "pca-128"


def train_spaces(
    dataset: VectorDataset, folder: Path, *, callback: Callable[[str], None] = lambda line: None
) -> list[Path]:
    """Fit every space on the training people and write it to ``folder``; what exists is kept.

    Fewer people than components leave out the spaces that are too large for them.
    """
    folder.mkdir(parents=True, exist_ok=True)
    basis = fit_basis(dataset, components_of(dataset), metric="parameter")
    coefficients = project_dataset(dataset, basis)
    # One range for all parameters, as in the original: its weights stay below 0.1, and it reads w * 10.
    largest = max(float(w.abs().max()) for _, w in dataset.chunks(dataset.training_rows))
    raw = AffineBasis(dataset.layout.size, scale=1 / largest)

    def fit(name: str) -> Space:
        about = provenance(name)
        if name in PCA_SIZES:
            return linear_space(dataset, basis.truncated(PCA_SIZES[name]), provenance=about)
        if name in VAES:
            return fit_vae(coefficients, basis, VAES[name], provenance=about)
        return fit_vae(dataset, raw, original_training(epochs=40), provenance=about)

    written = []
    sizes = {**PCA_SIZES, **{name: settings.latent for name, settings in VAES.items()}}
    for name in (*(n for n, size in sizes.items() if size <= basis.n_components), "original"):
        path = folder / f"{name}.safetensors"
        if not path.exists():
            space = fit(name)
            save_space(space, path)
            callback(f"spaces: {name} written, weight R2 {space.training_report['weight_r2']}")
        written.append(path)
    return written


def components_of(dataset: VectorDataset) -> int:
    """How many components a data set of avatars gets: 256, or all that its training people allow."""
    return min(COMPONENTS, len(dataset.training_rows) - 1)


def ship(
    dataset: VectorDataset, folder: Path, models: Path, *, replace: bool = False
) -> list[Path]:
    """Write the default space, the linear one of the same size, and the held-out LoRAs they are scored on.

    Directions and start networks of what is there stay where the coordinates do. Where they do not, they mean nothing
    in the new space: then this raises ConfigError before anything is written, unless told to ``replace`` them.
    """
    spaces = {"avatars": (DEFAULT, "Avatars"), "avatars-pca": (LINEAR, "Avatars (linear)")}
    found = {
        models / f"{name}.safetensors": (folder / f"{source}.safetensors", title)
        for name, (source, title) in spaces.items()
    }
    for path, (source, _) in found.items():
        lost = path.exists() and not same_coordinates(source, path) and extras(path)
        if lost and not replace:
            raise ConfigError(
                f"{path} holds {' and '.join(lost)} for other latents than {source}. Ship with --replace, and make "
                "them again with 'w2wpp avatars start --ship' and 'w2wpp avatars directions --ship'."
            )
    for path, (source, title) in found.items():
        space = load_space(source)
        space = space.with_(provenance={**space.provenance, "name": title})
        if path.exists() and same_coordinates(source, path):
            before = load_space(path)
            about = {k: v for k, v in before.provenance.items() if k == "directions"}
            space = space.with_(
                provenance={**space.provenance, **about},
                directions=before.directions,
                start=before.start,
            )
        save_space(space, path)
    heldout = models / "avatars-heldout.safetensors"
    write_heldout(dataset, heldout)
    return [*found, heldout]


def write_heldout(dataset: VectorDataset, path: Path) -> None:
    """The held-out people's LoRAs behind the mean of the others: all that scoring a space needs of a data set."""
    assert dataset.labels is not None
    held = dataset.heldout_rows
    mean = dataset.vectors(dataset.training_rows).mean(0, keepdim=True)
    nobody = torch.tensor([-1])
    write_dataset(
        path,
        torch.cat([mean, dataset.vectors(held)]),
        dataset.layout,
        torch.cat([nobody, dataset.identity[held]]),
        heldout=torch.cat([nobody > 0, dataset.heldout[held]]),
        labels=torch.cat([torch.zeros(1, len(TRAITS)), dataset.labels[held]]),
        label_names=TRAITS,
        provenance={**dataset.provenance, "first_row": "mean LoRA of the training people"},
    )


def provenance(name: str) -> dict[str, Any]:
    """What every space of the miniature world says of itself."""
    return {
        "name": f"avatars {name}",
        "version": "1",
        "licence": "Apache-2.0",
        "trigger_prompt": "person",
        "base_model": "avatar-base.safetensors",
        "made_by": "w2wpp avatars spaces",
    }
