"""From rewards to gradients: advantages, losses, the gap between engine and actor."""
