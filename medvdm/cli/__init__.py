"""The command ``medvdm``."""
