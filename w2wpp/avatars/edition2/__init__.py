"""The second edition of the miniature world: 128x128 pictures, latent diffusion, scenes instead of passport photos.

It grows beside the first edition and takes its place when all of its stages have been trained.
"""
