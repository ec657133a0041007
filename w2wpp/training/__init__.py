"""From LoRA vectors to a space: data sets, PCA and the training of VAEs.

In the order of use, all of them also under `w2wpp`: `write_dataset` or `load_dataset`, `fit_basis`, `project_dataset`,
then `linear_space` (PCA, as weights2weights has it) or `fit_vae` with `VaeTraining`; `space_directions` finds
attributes to edit along.
"""
