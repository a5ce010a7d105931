"""Hostile and damaged artifacts, made by code from real compiled ones, and the processes that load them."""
