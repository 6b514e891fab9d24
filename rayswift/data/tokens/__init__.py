"""Laid-out conversations → token ids: segments, the encoder, packs, and rows of tokens by number."""
