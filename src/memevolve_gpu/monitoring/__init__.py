"""Events of a store and latencies of its searches."""
