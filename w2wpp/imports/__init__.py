"""Files of others: official weights2weights data and the seed's checkpoints."""
