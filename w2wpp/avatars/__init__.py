"""The miniature world: avatars with known identities, and a diffusion model that paints them."""
