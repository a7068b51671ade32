"""What mechanisms share whose matrices are computed from smaller parameters: the factors, the layers, the rest."""
