"""Diffusion without a host: noise schedule and sampler."""
