"""Averages of the weights of several models: interpolation and soups."""
