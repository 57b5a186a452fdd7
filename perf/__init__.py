"""Measurements on a card. Nothing imports this; it uses the public interface only."""
