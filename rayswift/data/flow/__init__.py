"""What is read in which order, and where it goes: map-style data through the cache, streams through Ray Data."""
