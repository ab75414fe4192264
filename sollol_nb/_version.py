"""The version, where the build and the command line read it without loading the package's names."""

__version__ = "0.1.0"
