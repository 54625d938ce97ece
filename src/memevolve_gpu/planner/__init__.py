"""Pure functions that decide: which body, how many lists, how many bytes, how much effort."""
