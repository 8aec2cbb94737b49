"""From rewards to gradients: advantages, losses, correction of the engine-actor mismatch."""
