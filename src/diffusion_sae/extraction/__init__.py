"""From images to activations. The only room that imports diffusers."""
