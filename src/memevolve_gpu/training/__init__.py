"""What an index is trained on and how its quality is judged."""
