"""Checkpoints that are whole or not there: the manifest, and the store that workers write through."""
