"""Names of other tools, on dwindle: :mod:`dwindle.compat.nni`."""
