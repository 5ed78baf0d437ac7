"""Paths of NNI 1.x and 2.x."""
