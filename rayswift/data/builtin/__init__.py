"""Data that ships with RaySwift, and the datasets whose rows need a function (:mod:`rayswift.data.builtin.recipes`)."""
