"""What runs again in the backward pass instead of being kept."""
