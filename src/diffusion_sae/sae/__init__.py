"""k-sparse autoencoders and their training."""
