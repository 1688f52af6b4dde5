"""CLIP's towers, the weights that others published, checkpoint files, the model over several ranks."""
