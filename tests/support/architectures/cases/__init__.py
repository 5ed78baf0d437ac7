"""Hand-written models that are meant to be awkward, by what makes them so; ``..hand_written`` joins them."""
