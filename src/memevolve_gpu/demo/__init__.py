"""Programs that show what this package is for: ``python -m memevolve_gpu.demo.corruption``."""
