"""ProFusion: guidance by several conditionings, and the sampler that fuses them."""
