"""What :func:`dwindle.repair` is made of: least squares, calls that are affine, runs side by side, the report."""
