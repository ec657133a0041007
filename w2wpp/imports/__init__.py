"""Files of others: official weights2weights data and the checkpoints of the original w2w++.

`w2wpp.open_w2w` and `w2wpp.write_w2w_space` make a linear space of the official files, `w2wpp.read_coefficients`
identities of what the official code saved, `w2wpp.read_vae` a space of an original checkpoint.
"""
