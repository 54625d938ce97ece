"""A part of MemEvolve that this project does not replace."""

HERE = "stand-in"
