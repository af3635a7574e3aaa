"""Pages that show a person what a k-SAE and a probe found; they need neither torch nor a network."""
