"""What was found: latents and their images, what layers know, each beside its baseline."""
