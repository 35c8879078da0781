"""Attacks with the gradient of what they attack, or, as One Pixel, its scores."""
