"""Programs that show what this package does: ``python -m memevolve_gpu.demo.corruption``."""
