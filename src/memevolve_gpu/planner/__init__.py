"""Pure functions that decide: which index, how many lists, how many bytes, which search parameters, which engine."""
