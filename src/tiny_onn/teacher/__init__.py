"""The dense model that teaches, which is found, checked, loaded and quantised here."""
