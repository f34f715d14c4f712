"""Contrastive losses over a pool of any size; logits are never stored."""
