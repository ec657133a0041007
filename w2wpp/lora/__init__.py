"""What a LoRA is: layout, files, gauge, and many of them in one batch."""
