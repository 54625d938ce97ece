"""What an index is trained on, how its recall is measured, and how its search parameters are calibrated."""
