"""A stand-in for MemEvolve, written for the tests of the drop-in: the same paths, next to nothing behind them."""
