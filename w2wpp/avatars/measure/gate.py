"""The gate of the miniature world: is there anything in its LoRAs that a space could learn?

Written to ``benchmarks/results/world.json``. Every later figure rests on these.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...metrics import consistency, estimate, id_scores, pooled_r2, ratio_estimate, ridge_regression
from ...noise import standard_normal
from ...training.dataset import VectorDataset
from ...training.fit_basis import fit_basis
from ..world.studio import Studio

PENALTIES = (1e-4, 1e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0)


def judge_world(
    studio: Studio, dataset: VectorDataset, *, components: int, adherence_pictures: int = 100
) -> dict[str, Any]:
    """Measure a LoRA set over its held-out people: figures, with intervals and details under ``rows``."""
    layout, held = dataset.layout, dataset.heldout_rows
    assert dataset.labels is not None
    identity, vectors = dataset.labels[held], dataset.vectors(held)
    own = studio.photograph(vectors, layout)
    none = studio.photograph_nobody(adherence_pictures)

    basis = fit_basis(dataset, components, metric="parameter")
    reconstruction = basis.lift(basis.project(vectors))
    rebuilt = studio.photograph(reconstruction, layout)
    generator = torch.Generator().manual_seed(11)
    sampled = basis.lift(standard_normal(len(held), basis.n_components, generator=generator))
    imagined = studio.photograph(sampled, layout)

    own_id, rebuilt_id = (id_scores(shots.embeddings, identity) for shots in (own, rebuilt))
    strangers = identity.roll(1, 0)
    rows = {
        "own_lora": estimate(own_id),
        "other_lora": estimate(id_scores(own.embeddings, strangers)),
        "no_lora": estimate(id_scores(none.embeddings, identity[torch.arange(len(none.traits)) % len(identity)])),
        "pca_reconstruction": estimate(rebuilt_id),
        "pca_reconstruction_ratio": ratio_estimate(rebuilt_id, own_id, paired=True),
        "identity_from_weights_cosine": estimate(_identity_from_weights(dataset)),
        "own_consistency": estimate(consistency(own.embeddings)),
        "sample_consistency": estimate(consistency(imagined.embeddings)),
        "sample_consistency_ratio": ratio_estimate(
            consistency(imagined.embeddings), consistency(own.embeddings), paired=False
        ),
        "base_prompt_adherence": estimate(none.prompt_adherence()),
        "lora_prompt_adherence": estimate(own.prompt_adherence()),
        "prompt_adherence_share": ratio_estimate(own.prompt_adherence(), none.prompt_adherence(), paired=False),
        **{
            f"base_prompt_adherence_{slot}": estimate(none.obeyed[:, :, i].float().mean(1))
            for i, slot in enumerate(("background", "smile", "light"))
        },
    }  # fmt: skip
    headline = (
        "own_lora", "other_lora", "no_lora", "pca_reconstruction_ratio", "identity_from_weights_cosine",
        "sample_consistency_ratio", "prompt_adherence_share",
    )  # fmt: skip
    return {
        "identities": len(dataset),
        "heldout": len(held),
        "components": components,
        "parameters": layout.size,
        "guidance": studio.guidance,
        "weight_r2": pooled_r2(vectors, reconstruction, basis.mean),
        **{name: rows[name].mean for name in headline},
        "rows": {name: value.to_json() for name, value in rows.items()},
    }


def _identity_from_weights(dataset: VectorDataset) -> Tensor:
    """Cosine [N] between held-out identities and their ridge regression from the weights.

    The penalty is chosen on a fifth of the training people.
    """
    assert dataset.labels is not None
    train, held = dataset.training_rows, dataset.heldout_rows
    cut = len(train) // 5
    scores = [_regress(dataset, train[cut:], train[:cut], penalty).mean() for penalty in PENALTIES]
    return _regress(dataset, train, held, PENALTIES[int(torch.stack(scores).argmax())])


def _regress(dataset: VectorDataset, train: Tensor, test: Tensor, penalty: float) -> Tensor:
    assert dataset.labels is not None
    input_mean, weights, target_mean = ridge_regression(
        dataset.vectors(train), dataset.labels[train], penalty
    )
    predicted = (dataset.vectors(test) - input_mean) @ weights + target_mean
    return F.cosine_similarity(predicted, dataset.labels[test], dim=1)


GOALS = {
    "own_lora": ("ID score of a person's own LoRA", "at least 0.70"),
    "other_lora": ("ID score of another's LoRA", "below 0.10"),
    "no_lora": ("ID score without a LoRA", "below 0.05"),
    "base_prompt_adherence": ("prompt adherence of the base (background, smile, light)", "at least 0.95"),
    "base_prompt_adherence_background": ("of these, the background", ""),
    "base_prompt_adherence_smile": ("of these, the smile", ""),
    "base_prompt_adherence_light": ("of these, the light", ""),
    "lora_prompt_adherence": ("prompt adherence with a LoRA", ""),
    "prompt_adherence_share": ("that, as a share of the base's", "at least 0.90"),
    "pca_reconstruction": ("ID score of held-out people rebuilt by PCA", ""),
    "pca_reconstruction_ratio": ("that, as a share of their own LoRAs'", "at least 0.80"),
    "identity_from_weights_cosine": ("identity read from held-out weights, cosine", "at least 0.70"),
    "own_consistency": ("real people resemble themselves, cosine", ""),
    "sample_consistency": ("sampled people resemble themselves, cosine", ""),
    "sample_consistency_ratio": ("that, as a share of real people's", "at least 0.70"),
}  # fmt: skip


def gate_table(result: dict[str, Any]) -> str:
    """The figures beside what they have to reach, as a table in Markdown."""
    lines = [
        f"| {result['identities']} people, {result['heldout']} held out, P = {result['parameters']}, "
        f"PCA {result['components']} | mean (95 % interval) | goal |",
        "|---|---|---|",
    ]
    for name, (what, goal) in GOALS.items():
        row = result["rows"][name]
        lines.append(
            f"| {what} | {row['mean']:.3f} ({row['low']:.3f} to {row['high']:.3f}) | {goal} |"
        )
    return "\n".join(lines)
