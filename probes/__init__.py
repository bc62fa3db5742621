"""What is in a model's activations, and what training did to them."""
