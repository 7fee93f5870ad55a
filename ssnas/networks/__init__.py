"""The search space, its genotypes, the supernet, the derived network and the baselines."""
