"""Pure functions that decide: which index, how many lists, how many bytes, how much effort."""
