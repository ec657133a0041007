"""All that knows the host's internals, and nothing else."""
