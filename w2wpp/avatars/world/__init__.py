"""What the miniature world is: renderer, base model, painter, embedder."""
