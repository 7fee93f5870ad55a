"""Self-supervised differentiable architecture search for imbalanced image data."""
