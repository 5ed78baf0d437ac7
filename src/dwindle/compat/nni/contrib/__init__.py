"""``nni.contrib``, where NNI 3.0's compression grew up."""
