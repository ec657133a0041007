"""From LoRA vectors to a space: data sets, PCA and the training of VAEs."""
